"""Everything that tells whether Bessemer works, with one page of results: `make test-nightly`.

    python -m tests.nightly                          # nightly.md, within six hours on two cores (`--hours`)
    python -m tests.nightly --only tests wheels      # some of the steps
    python -m tests.nightly --list

A step is a command. It ends early at its share of the time, which counts as a failure; the others are run all the same. The
exit code is 1 where any failed. `make` makes the environments that a step needs.

What a step came to is kept beside the page, so that a night may be spread over several: a step that passed at this commit is
not run again (`--anew`: it is), and the page shows all that are kept, each with the commit that it was run at. A peer's
environment, of some gigabytes, is removed after its step, unless it was there before. The commands of the pages are a step a
guide, the longest examples last: what six hours are not enough for is named on the page, and left to another night.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bessemer.core.environment import git_commit
from tests.follow import guides

ROOT = Path(__file__).resolve().parents[1]
PEERS = re.search(r"^PEERS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
#: A line of output that sums a step up, the last of which the page shows.
_SUMMARY = re.compile(r"\b(passed|failed|whole rounds|mutants noticed|commands|Success|components|kept|built)\b")
_LINES = 15
#: Minutes of what takes longer than the others of its kind.
_PEER_MINUTES = {"smollm2": 20, "clients": 8}
_GUIDE_MINUTES = {
    "README.md": 35,
    "docs/tutorials/model-from-text.md": 30,
    "examples/tiny_model.py": 8,
    "examples/engine.py": 9,
    "examples/quantise_and_serve.py": 8,
    "examples/tickets.csv": 12,
    "examples/support_bot": 45,
    "examples/arithmetic": 60,
    "examples/reasoning": 60,
    "examples/distillation": 45,
    "examples/coding_assistant": 45,
    "examples/domain": 45,
}
#: A test that failed, as `make test-slow` tells it when it ends, so also in a step that is ended before pytest's summary.
_FAILED_TEST = re.compile(r"(FAILED|ERROR) \S+::")
#: A temporary folder, of a clone or of a test.
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/(pytest-of-[^/\s]+/)?[^/\s]+/")


@dataclass(frozen=True)
class Step:
    """minutes: after which it is ended. command: from the checkout's folder. makes: a folder in the checkout that is removed
    after it, unless it was there before."""

    name: str
    minutes: float
    command: Sequence[str]
    makes: str | None = None

    @property
    def log(self) -> str:
        """The name of the file that keeps what it writes."""
        return re.sub(r"\W+", "-", self.name) + ".txt"


@dataclass(frozen=True)
class Outcome:
    """code: the command's exit code; None where it was ended. end: the last lines that it wrote. commit: what was checked."""

    step: Step
    code: int | None
    seconds: float
    end: Sequence[str]
    commit: str

    @property
    def word(self) -> str:
        return "ended: too long" if self.code is None else "passed" if self.code == 0 else f"FAILED ({self.code})"

    @property
    def summary(self) -> str:
        """The last line that sums up, or the last line."""
        plain = [line.strip(" =") for line in self.end if line.strip(" =")]
        return next((line for line in reversed(plain) if _SUMMARY.search(line)), plain[-1] if plain else "")


def steps() -> list[Step]:
    """All steps, the longest examples last, which six hours may not be enough for."""
    module = [sys.executable, "-m"]
    return [
        Step("lint", 5, ["make", "lint"]),
        Step("tests", 90, ["make", "test-slow"]),
        *(
            Step(f"peer {name}", _PEER_MINUTES.get(name, 5), ["make", f"test-peer-{name}"], f".venv-{name}")
            for name in PEERS[1].split()
        ),
        Step("docs", 5, ["make", "docs"]),
        Step("wheels", 15, [*module, "tests.nightly", "--wheels"]),
        Step("mutations", 20, [*module, "tests.nightly", "--mutations"]),
        Step("new inputs", 12, ["make", "fuzz", "MINUTES=10"]),
        *(
            Step(f"commands of {guide.name}", _GUIDE_MINUTES.get(guide.name, 5), ["make", "follow", f"GUIDES={guide.name}"])
            for guide in guides()
        ),
    ]


def run(step: Step, log: Path, commit: str) -> Outcome:
    """A step, with its output in a file. What it started ends with it."""
    started = time.monotonic()
    made = ROOT / step.makes if step.makes and not (ROOT / step.makes).exists() else None
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=60 * step.minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if made:
                shutil.rmtree(made, ignore_errors=True)
    # without temporary folders and that of the checkout, so that the record can be kept on another machine
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{ROOT}{os.sep}", "")
    lines = _TEMPORARY.sub("", text).splitlines()
    end = lines[-_LINES:]
    # what libraries say while Python ends may be longer than that
    sums = [] if any(map(_SUMMARY.search, end)) else [line for line in lines if _SUMMARY.search(line)][-1:]
    failed = [line for line in lines if _FAILED_TEST.search(line)] if code is None else []
    return Outcome(step, code, time.monotonic() - started, failed + sums + end, commit)


def kept(file: Path) -> dict[str, Outcome]:
    """Outcomes of earlier runs, by the names of their steps, as far as there still are such steps."""
    if not file.exists():
        return {}
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    found = {step.name: step for step in steps()}
    return {row["step"]: Outcome(**row | {"step": found[row["step"]]}) for row in rows if row["step"] in found}


def page(outcomes: Sequence[Outcome], when: datetime.date) -> str:
    """The page of results, in Markdown: a row a step, and the end of what each that failed wrote."""
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    verdict = f"{len(failed)} of {len(outcomes)} steps failed" if failed else f"all {len(outcomes)} steps passed"
    not_run = [step.name for step in steps() if step.name not in {outcome.step.name for outcome in outcomes}]
    commits = list(dict.fromkeys(outcome.commit for outcome in outcomes))
    of = f"Commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits"
    lines = [f"# Nightly of {when.isoformat()}", "", f"{of}; {verdict}, in {hours:.1f} hours.", ""]
    lines += [f"Not run: {', '.join(not_run)}.", ""] if not_run else []
    lines += ["| step | | commit | minutes | |", "|---|---|---|---|---|"]
    for one in outcomes:
        summary = one.summary.replace("|", "\\|")
        minutes = f"{one.seconds / 60:.1f} of {one.step.minutes:g}"
        lines.append(f"| {one.step.name} | {one.word} | {one.commit} | {minutes} | {summary} |")
    for one in failed:
        lines += ["", f"## {one.step.name}", "", "```", *one.end, "```"]
    return "\n".join(lines) + "\n"


def mutations() -> int:
    """The recorded changes of operators once more: 1 where the nearest tests let one pass that they noticed. In a clone, so
    that the recorded result stays."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if (ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        command = [sys.executable, "benchmarks/mutation.py", "--again"]
        subprocess.run(command, cwd=clone, env=os.environ | {"PYTHONPATH": str(clone / "src")}, check=True)
        figures = json.loads((clone / "benchmarks" / "results" / "mutation.json").read_text(encoding="utf-8"))["figures"]
    pairs = list(zip(figures["first"]["mutants"], figures["again"]["mutants"], strict=True))
    lost = [
        f"{new['file']}:{new.get('line')} {new['statement']} [{new['change']}]"
        for old, new in pairs
        if old["outcome"] == "noticed" and new["outcome"] not in ("noticed", "gone")
    ]
    print(*lost, sep="\n")
    there = [new["outcome"] for _, new in pairs if new["outcome"] != "gone"]
    print(f"{there.count('noticed')} of {len(there)} mutants noticed, {len(lost)} no longer")
    return int(bool(lost))


def wheels() -> int:
    """The wheel and the kernels', built from the sdist, installed in a new environment, and used outside the checkout."""
    with tempfile.TemporaryDirectory(prefix="a wheel ") as folder:
        index, work = Path(folder) / "index", Path(folder) / "work"
        work.mkdir()
        frontend = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(index)]
        for source in (ROOT, ROOT / "kernels"):
            subprocess.run(
                [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(index)], cwd=source, check=True
            )
        for packed in sorted(index.glob("*.tar.gz")):
            subprocess.run([*frontend, "--no-build-isolation", str(packed)], check=True)
        (wheel,) = index.glob("bessemer-*.whl")
        version = wheel.name.split("-")[1]
        python = Path(folder) / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        wanted = [f"bessemer[all]=={version}", f"bessemer-kernels=={version}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--find-links", str(index), *wanted], cwd=work, check=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CXX": "/bin/false"}
        for words in (["--version"], ["doctor"], ["recipes"], ["run", "quickstart", "--dry-run"]):
            command = [str(python.with_name("bessemer")), *words]
            subprocess.run(command, cwd=work, env=environment, check=True)
        print(f"built, installed and used: {', '.join(path.name for path in sorted(index.glob('*.whl')))}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[], help="the first words of steps")
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--hours", type=float, default=6, help="begin no step that may end later than after these hours (6)")
    parser.add_argument("--anew", action="store_true", help="run steps that passed at this commit again")
    parser.add_argument("--out", type=Path, default=ROOT / "nightly.md", help="the page (nightly.md)")
    parser.add_argument("--mutations", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--wheels", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mutations or arguments.wheels:
        return mutations() if arguments.mutations else wheels()
    chosen = [step for step in steps() if not arguments.only or any(step.name.startswith(word) for word in arguments.only)]
    if not chosen:
        parser.error(f"no such step; there are: {', '.join(step.name for step in steps())}")
    if arguments.list:
        for step in chosen:
            print(f"{step.name}: {' '.join(step.command)}, at most {step.minutes:g} minutes")
        return 0
    logs = arguments.out.with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    file, commit, order = logs / "outcomes.json", git_commit() or "unknown", [step.name for step in steps()]
    outcomes, started = kept(file), time.monotonic()
    for step in chosen:
        before = outcomes.get(step.name)
        is_same = before is not None and before.commit == commit and commit != "unknown" and not commit.endswith("+changes")
        if is_same and before.code == 0 and not arguments.anew:
            print(f"{step.name}: passed at {commit} already", flush=True)
            continue
        if time.monotonic() - started + 60 * step.minutes > 3600 * arguments.hours:
            print(f"{step.name}: not begun, as it may take {step.minutes:g} minutes; another night goes on with it", flush=True)
            continue
        print(f"{step.name} …", flush=True)
        outcomes[step.name] = now = run(step, logs / step.log, commit)
        print(f"  {now.word}, {now.seconds / 60:.1f} minutes: {now.summary}", flush=True)
        # after every step, so that a machine that is taken away leaves what was done
        rows = sorted(outcomes.values(), key=lambda outcome: order.index(outcome.step.name))
        record = [asdict(outcome) | {"step": outcome.step.name} for outcome in rows]
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        arguments.out.write_text(page(rows, datetime.date.today()), encoding="utf-8")
    return int(any(outcomes[step.name].code != 0 for step in chosen if step.name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
