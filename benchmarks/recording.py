"""The results of benchmarks as files: what was measured, on which machine, at which commit, beside which version of the peer.

A benchmark calls `save(NAME, …)` when it has ended; `benchmarks/results/NAME.json` is then all that README and docs know of it
(`tables.py` renders their tables from these files). A result holds

- `figures`: nested dicts of raw numbers, under stable keys;
- `tables`: by name, columns with a Python format each, and rows of raw cells. A cell may be text, a number, a pair [low, high]
  that is shown as `low–high`, or null;
- `machine`, `commit`, `measured` (the day), `peers` (package → version), `command`.

`not_run("why")` ends a benchmark that lacks its device or its peer: `run_all.py` shows the line and goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from bessemer.core.environment import git_commit, host
from bessemer.core.machines import MACHINE_VARIABLE

RESULTS = Path(__file__).parent / "results"
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
    """Write the result `name`, replacing an earlier one; its file.

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
                Path(sys.argv[0]).resolve().relative_to(Path(__file__).parents[1]).as_posix(),
                *(Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]),
            ]
        ),
        "measured": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "machine": machine(),
        "peers": versions,
        "note": note,
        "figures": figures,
        "tables": tables or {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The result `name`. Raises FileNotFoundError when it was never measured."""
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


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
        asked = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False).stdout
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
