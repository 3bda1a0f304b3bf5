"""The results of benchmarks as files: what was measured, on which machine, at which commit, beside which version of the peer.

A benchmark calls `save(NAME, …)` when it has ended; `benchmarks/results/NAME.json` is then all that README and docs know of it
(`tables.py` renders their tables from these files). A result holds

- `figures`: nested dicts of raw numbers, under stable keys;
- `tables`: by name, columns with a Python format each, and rows of raw cells. A cell may be text, a number, a pair [low, high]
  that is shown as `low–high`, or null;
- `machine`, `commit`, `measured` (the day), `peers` (package → version), `command`.

A result is evidence: `save` writes it into `benchmarks/results/` only from a tree without uncommitted changes; from another
one it goes to a temporary folder, and no page shows it. Nobody else writes or changes these files. A median lies beside its
`rounds` (`rounds.py`). A benchmark names in `MEASURES` the source that its result depends on, so that `tables.py` can say which
results later commits made stale.

`not_run("why")` ends a benchmark that lacks its device or its peer: `run_all.py` shows the line and goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from bessemer.core.environment import git_commit, host
from bessemer.core.machines import MACHINE_VARIABLE

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
#: The commit of the tree when the benchmark began.
_COMMIT = git_commit()
#: Exit status of a benchmark that lacks what it measures (as in automake's test driver: skipped).
NOT_RUN = 77
#: The sets that change how fast matrix products are, in the order in which they are named.
_INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def save(
    name: str,
    figures: Mapping[str, Any],
    *,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    peers: Iterable[str] | Mapping[str, str] = (),
    note: str | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write the result `name`, replacing an earlier one; its file. In place of `RESULTS` that is a temporary folder where the
    tree has uncommitted changes, or had when the benchmark began.

    peers: packages whose installed versions are looked up, or names with their versions. note: what a reader must know of the
    circumstances, shown with every table.
    """
    versions = dict(peers) if isinstance(peers, Mapping) else {peer: metadata.version(peer) for peer in peers}
    result = {
        "name": name,
        "command": " ".join(
            # of a folder on this machine its name
            [
                "python",
                Path(sys.argv[0]).resolve().relative_to(_ROOT).as_posix(),
                *map(without_folder, sys.argv[1:]),
            ]
        ),
        "measured": datetime.date.today().isoformat(),
        "commit": _COMMIT,
        "machine": machine(),
        "peers": versions,
        "note": note,
        "figures": figures,
        "tables": tables or {},
    }
    if folder == RESULTS and (_COMMIT is None or "+" in _COMMIT):
        folder = Path(tempfile.gettempdir()) / "bessemer-unrecorded-results"
        print(
            f"not recorded: measured at {_COMMIT or 'no commit'}; a result needs a tree without uncommitted changes", flush=True
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The result `name`. Raises FileNotFoundError when it was never measured."""
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def when() -> dict[str, Any]:
    """The day and the commit of this run, for one part of a result whose other parts were measured by runs before."""
    return {"measured": datetime.date.today().isoformat(), "commit": _COMMIT}


def defects(result: Mapping[str, Any]) -> list[str]:
    """Why a file is no evidence, a sentence each, from what it says of itself; empty for a result as `save` writes it."""
    found = []
    commit, machine = result["commit"], result["machine"]
    if not isinstance(commit, str) or "+" in commit:
        found.append(f"measured at {commit or 'no commit'}, and not on a tree without uncommitted changes")
    elif has_history() and _git("merge-base", "--is-ancestor", commit, "HEAD") is None:
        found.append(f"measured at {commit}, which is no ancestor of the current commit")
    script = result["command"].split()[1] if result["command"].startswith("python benchmarks/") else None
    if script is None or not (_ROOT / script).is_file():
        found.append(f"no benchmark writes it: {result['command']}")
    if not machine.get("python") or not machine.get("memory_bytes"):
        found.append("its machine is not named with memory and version of Python")
    parts = part_commits(result)
    found += [f"{name} was measured at {commit}" for name, commit in parts.items() if not commit or "+" in commit]
    found += [f"{path} is a median without its rounds" for path in _without_rounds(result["figures"])]
    return found


def part_commits(result: Mapping[str, Any]) -> dict[str, str]:
    """The commit of each part that a run of its own measured (`when`), by the part's name."""
    return {name: part["commit"] for name, part in result["figures"].items() if isinstance(part, Mapping) and "commit" in part}


def commits_since(result: Mapping[str, Any], paths: Iterable[str], repository: Path = _ROOT) -> tuple[str, int]:
    """The commit of the result's oldest part, and how many since it changed any of these paths, which are relative to the
    repository; none outside one."""
    listed = {
        commit: _git("rev-list", f"{commit}..HEAD", "--", *paths, repository=repository) or ""
        for commit in (result["commit"], *part_commits(result).values())
    }
    oldest = max(listed, key=lambda commit: len(listed[commit].split()))
    return oldest, len(listed[oldest].split())


def original(name: str) -> dict[str, Any] | None:
    """The result as it was first committed after its run, by day, commit and command; None where git does not tell."""
    path = (RESULTS / f"{name}.json").relative_to(_ROOT).as_posix()
    now, found = load(name), None
    for commit in (_git("log", "--format=%H", "--", path) or "").split():
        text = _git("show", f"{commit}:{path}")
        before = json.loads(text) if text else None
        if before is None or any(before[key] != now[key] for key in ("measured", "commit", "command")):
            break
        found = before
    return found


def _without_rounds(figures: Any, path: str = "figures", in_rounds: bool = False) -> list[str]:
    """Where a median stands without its rounds: beside it, or beside what it belongs to, as a latency to a rate."""
    if not isinstance(figures, Mapping):
        return []
    in_rounds = in_rounds or bool(figures.get("rounds"))
    found = [path] if isinstance(figures.get("median"), int | float) and not in_rounds else []
    return found + [each for key, value in figures.items() for each in _without_rounds(value, f"{path}.{key}", in_rounds)]


def has_history() -> bool:
    """Whether git knows all earlier commits here; not in an unpacked archive or a shallow clone."""
    return (_git("rev-parse", "--is-shallow-repository") or "").strip() == "false"


def _git(*arguments: str, repository: Path = _ROOT) -> str | None:
    """What git prints about a repository; None where it fails."""
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def without_folder(argument: str) -> str:
    """An argument of a command without the folders of an absolute path, also as NAME=PATH: they are of one machine."""
    name, mark, value = argument.partition("=")
    if mark and Path(value).is_absolute():
        return f"{name}={Path(value).name}"
    return Path(argument).name if Path(argument).is_absolute() else argument


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """A table of a result. columns: headings, each with the format of its numbers, such as `,.0f` or `.1%`."""
    return {"columns": [list(column) for column in columns], "rows": [list(row) for row in rows]}


def machine() -> dict[str, Any]:
    """This machine as a reader needs it to judge a figure: `host()`, the processor's instruction sets, and for which of the
    machines of `bessemer.core.machines` it stood."""
    stood_for = os.environ.get(MACHINE_VARIABLE, "native")
    return host() | {"as": stood_for, "instruction_sets": instruction_sets(), "python": platform.python_version()}


def instruction_sets() -> list[str]:
    """Those of the processor's instruction sets that matter to matrix products; empty where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    elif sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-a"], capture_output=True, encoding="utf-8", check=False).stdout
        names = {
            "hw.optional.arm.FEAT_DotProd": "asimddp",
            "hw.optional.arm.FEAT_I8MM": "i8mm",
            "hw.optional.arm.FEAT_BF16": "bf16",
        }
        flags = [short for name, short in names.items() if f"{name}: 1" in asked]
    else:
        flags = []
    return [name for name in _INSTRUCTION_SETS if name in flags]


def not_run(why: str) -> NoReturn:
    """End this benchmark without a result: what it measures is not on this machine. Prints `not run: why`."""
    print(f"not run: {why}", flush=True)
    raise SystemExit(NOT_RUN)


def needs(*packages: str, install: str | None = None) -> None:
    """End this benchmark unless the packages can be imported. install: how to get them, where `make bench` does not."""
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        not_run(f"{', '.join(missing)} is not installed" + (f" ({install})" if install else ""))
