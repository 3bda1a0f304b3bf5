"""The quickstart on other people's machines: `make run` in a fresh clone, as each of them, with empty caches.

    python benchmarks/machines.py native avx2 avx2-busy-core avx2-one-core      # about ten minutes each
    python benchmarks/machines.py native --keep FOLDER                         # leave the clone there, for quickstart.py --of
    python benchmarks/machines.py                                              # what is recorded, nothing is run

The names are those of `bessemer.core.machines`. A clone installs from a warm package cache; what PyTorch, Numba and the kernels
compile is compiled anew. The seconds are those of the whole command, installing and asking included. A machine's row replaces
its earlier one; each has its own commit, day and processor. Result: `machines.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
from bessemer.core.environment import git_commit
from bessemer.core.machines import MACHINE_VARIABLE, MACHINES, machine
from bessemer.core.metrics import duration
from quickstart import figures_of_run

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/recipes/quickstart.yaml",
    "src/bessemer/recipes/chat.yaml",
    "src/bessemer/pipeline",
    "src/bessemer/data",
    "src/bessemer/tokenization",
    "src/bessemer/model",
    "src/bessemer/training",
    "src/bessemer/posttraining",
    "src/bessemer/evaluation",
    "src/bessemer/core",
)

ROOT = Path(__file__).parents[1]
NAME = "machines"


def measured(name: str, keep: Path | None) -> dict[str, Any]:
    """The figures of `make run` as one machine. keep: where the clone is left."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches:
        clone = Path(folder) / "bessemer" if keep is None else keep
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        places = {"TMPDIR": caches, "TORCH_EXTENSIONS_DIR": str(Path(caches) / "extensions")}
        start = time.perf_counter()
        subprocess.run(["make", "run", f"MACHINE={name}"], cwd=clone, check=True, env=environment | places)
        seconds = time.perf_counter() - start
        figures = figures_of_run(clone, {"first_run": seconds, "again": 0.0})
        return {
            "whole_seconds": seconds,
            "stages": figures["stages"],
            "training": figures["training"],
            "evaluation": figures["evaluation"],
            "bits_per_byte": figures["bits_per_byte"],
            "baselines": figures["baselines"],
            "scored": figures["scored"],
            "sums": figures["sums"],
            "machine": recording.machine() | {"as": name},
            "commit": git_commit(),
        }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in MACHINES if name in figures]
    rows = [
        (
            name,
            duration(figures[name]["whole_seconds"]),
            figures[name]["training"]["pretrain"]["number_of_steps"],
            figures[name]["bits_per_byte"]["pretrain"],
            figures[name]["baselines"]["witten_bell_5gram"],
            *(figures[name]["sums"].get(model) for model in ("sft", "rl")),
            ", ".join(cuts(figures[name])) or "nothing",
            figures[name].get("commit"),
        )
        for name in names
    ]
    return {
        "quickstart": recording.table(
            [
                *(("machine", ""), ("`make run`", ""), ("steps of pretraining", ",.0f"), ("bits per byte", ".2f")),
                *(("5-gram", ".2f"), ("sums right after sft", ".0%"), ("after rl", ".0%"), ("left out for want of time", "")),
                ("commit", ""),
            ],
            rows,
        ),
        "stages": recording.table(
            [("seconds", ""), *((name, ",.0f") for name in names)],
            [
                (stage, *(figures[name]["stages"].get(stage) for name in names))
                for stage in (figures[names[0]]["stages"] if names else ())
            ],
        ),
    }


def cuts(figures: dict[str, Any]) -> list[str]:
    """What the stages left out: shares of their steps, and of the evaluation's tokens and questions, that were made."""
    found = {
        stage: training["measured"]["steps"] / training["measured"]["planned_steps"]
        for stage, training in figures["training"].items()
        if training["measured"].get("planned_steps")
    }
    if figures["evaluation"].get("share", 1.0) < 1:
        found["evaluate"] = figures["evaluation"]["share"]
    return [f"{stage} {share:.0%} made".replace("%", " %") for stage, share in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="one after the other")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder, for the clone of the last of them")
    arguments = parser.parse_args()
    if MACHINE_VARIABLE in os.environ:
        parser.error(f"this process already stands for another machine ({os.environ[MACHINE_VARIABLE]})")
    try:
        figures = dict(recording.load(NAME)["figures"])
    except FileNotFoundError:
        figures = {}
    for name in arguments.machines:
        machine(name)
        figures[name] = measured(name, arguments.keep if name == arguments.machines[-1] else None) | recording.when()
        print(recording.save(NAME, figures, tables=tables(figures)))
    for row in tables(figures)["quickstart"]["rows"]:
        print("  ".join("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))


if __name__ == "__main__":
    main()
