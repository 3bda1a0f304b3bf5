"""Recipes read and checked, the stage graph, the runner, the report. Wires the other packages and computes nothing.

Here stands only what web pages and the command line need without loading the stages: the names of runs.
"""

from __future__ import annotations

from pathlib import Path


def run_names(runs: Path) -> list[str]:
    """Names of the runs in a folder."""
    return sorted(path.parent.name for path in runs.glob("*/run.json")) if runs.is_dir() else []
