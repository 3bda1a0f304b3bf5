"""`make test` on other people's machines: in a fresh clone, under each of several conditions, with its time.

    python benchmarks/suite.py native avx2              # about ten minutes each, installing not counted
    python benchmarks/suite.py stranger --keep clones   # as root: it becomes another user; clones, JUnit files stay
    python benchmarks/suite.py --profile 30             # the tests that take longest, by condition

A condition's row replaces its earlier one. Result: `suite.json`.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer", "tests")

ROOT = Path(__file__).parents[1]
NAME = "suite"


@dataclass(frozen=True)
class Condition:
    """machine: of `bessemer.core.machines`. python: the interpreter that `make` is given. user: who runs it. folder: name of
    the clone. locale: made where the system has its source."""

    description: str
    machine: str = "native"
    python: str = "python3.11"
    user: str | None = None
    folder: str = "bessemer"
    environment: Mapping[str, str] = field(default_factory=dict)
    locale: str | None = None


CONDITIONS = {
    "native": Condition("this machine as it is, Python 3.11"),
    "avx2": Condition("AVX2, Python 3.11", machine="avx2"),
    "stranger": Condition(
        "another user than root, a home that cannot be written to, Python 3.13, `LC_ALL=tr_TR.UTF-8`, a path with spaces",
        python="/usr/bin/python3.13",
        user="nobody",
        folder="my own copy",
        # root's folders of programs are closed to others
        environment={"HOME": "/nonexistent", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        locale="tr_TR",
    ),
    "ascii": Condition("Python 3.12, `LC_ALL=C`", python="python3.12", environment={"LC_ALL": "C"}),
    "no-compiler": Condition("no C++ compiler, Python 3.11", machine="no-compiler"),
}


def run(condition: Condition, place: Path) -> dict[str, Any]:
    """Install and test in a fresh clone in the folder `place`; counts, seconds, and seconds by test."""
    clone, caches, results = place / condition.folder, place / "caches", place / "results.xml"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shared = ROOT.parent / "shared"
    if shared.exists():
        # real data that some tests read, beside the checkout
        (place / "shared").symlink_to(shared)
    caches.mkdir()
    environment = (
        os.environ | dict(condition.environment) | {"TMPDIR": str(caches), "PYTEST_ADDOPTS": f"--junitxml='{results}'"}
    )
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if condition.locale is not None:
        environment |= made_locale(condition.locale, place / "locales")
    as_user: list[str] = []
    if condition.user is not None:
        for path in (place, *place.rglob("*")):
            if not path.is_symlink():
                shutil.chown(path, condition.user)
        as_user = ["setpriv", "--reuid", condition.user, "--regid", "nogroup", "--clear-groups"]
    make = [*as_user, "make", f"PYTHON={condition.python}", f"MACHINE={condition.machine}"]
    install = [*as_user, "make", f"PYTHON={condition.python}", ".venv/.installed-dev"]
    subprocess.run(install, cwd=clone, env=environment, check=True)
    ask_version = [str(clone / ".venv/bin/python"), "-c", "import platform; print(platform.python_version())"]
    python = subprocess.run(ask_version, capture_output=True, check=True, encoding="utf-8").stdout.strip()
    start, before = time.perf_counter(), processor_seconds()
    status = subprocess.run([*make, "test"], cwd=clone, env=environment, check=False).returncode
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    by_test = read_results(results)
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "status": status,
        **{outcome: sum(found == outcome for found, _ in by_test.values()) for outcome in ("passed", "failed", "skipped")},
        "not_passed": [name for name, (outcome, _) in by_test.items() if outcome == "failed"],
        "slowest": dict(sorted(((name, taken) for name, (_, taken) in by_test.items()), key=lambda pair: -pair[1])[:100]),
        "machine": recording.machine() | {"as": condition.machine, "python": python},
    }


def processor_seconds() -> float:
    """Of all child processes that have ended, and their own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def made_locale(name: str, folder: Path) -> dict[str, str]:
    """The variables of a locale, compiled into a folder. Ends the benchmark where the system has no source of it."""
    if shutil.which("localedef") is None or not (Path("/usr/share/i18n/locales") / name).exists():
        recording.not_run(f"there is no source of the locale {name} (on Debian: apt-get install locales)")
    folder.mkdir()
    subprocess.run(["localedef", "-i", name, "-f", "UTF-8", str(folder / f"{name}.UTF-8")], check=True)
    return {"LOCPATH": str(folder), "LC_ALL": f"{name}.UTF-8"}


def read_results(path: Path) -> dict[str, tuple[str, float]]:
    """Outcome and seconds of every test of a JUnit file."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        failed = any(case.find(tag) is not None for tag in ("failure", "error"))
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        file = re.sub(r"^tests\.", "", case.get("classname", "")).replace(".", "/")
        found[f"{file}::{case.get('name')}"] = (outcome, float(case.get("time", 0)))
    return found


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in CONDITIONS if name in figures]
    columns = [
        ("`make test` under", ""),
        ("passed", ",.0f"),
        ("failed", ",.0f"),
        ("skipped", ",.0f"),
        ("minutes", ".1f"),
        ("of processor time", ".1f"),
        ("commit", ""),
    ]
    rows = [
        (
            CONDITIONS[name].description,
            *(figures[name][outcome] for outcome in ("passed", "failed", "skipped")),
            figures[name]["seconds"] / 60,
            None if "processor_seconds" not in figures[name] else figures[name]["processor_seconds"] / 60,
            figures[name].get("commit"),
        )
        for name in names
    ]
    return {"conditions": recording.table(columns, rows)}


def recorded() -> dict[str, Any]:
    """The figures so far, of the conditions that there are."""
    try:
        return {name: found for name, found in recording.load(NAME)["figures"].items() if name in CONDITIONS}
    except FileNotFoundError:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conditions", nargs="*", metavar="CONDITION", help=", ".join(CONDITIONS))
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N tests that take longest")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave clones, environments and JUnit files here")
    arguments = parser.parse_args()
    for name in arguments.conditions:
        with ExitStack() as stack:
            if arguments.keep is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                place = arguments.keep.absolute() / name
                place.mkdir(parents=True)
            found = run(CONDITIONS[name], place) | recording.when()
        figures = recorded() | {name: found}
        print(recording.save(NAME, figures, tables=tables(figures)))
    figures = recorded()
    for name, found in figures.items():
        print(f"{name}: {found['passed']} passed, {found['failed']} failed, {found['seconds'] / 60:.1f} minutes")
        for test in found["not_passed"]:
            print(f"  failed: {test}")
        for test, seconds in list(found["slowest"].items())[: arguments.profile]:
            beside = figures.get("native", {}).get("slowest", {}).get(test)
            print(f"  {seconds:6.1f} s  {'' if beside is None else f'{seconds / max(beside, 0.1):4.1f} ×'}  {test}")


if __name__ == "__main__":
    main()
