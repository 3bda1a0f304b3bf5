"""Recipes read and checked, the stage graph, the runner, the report. Wires the other packages and computes nothing.

This file holds only what web pages and the command line need before the stages are loaded.
"""

from __future__ import annotations

from pathlib import Path


def run_names(runs: Path) -> list[str]:
    """Names of the runs in a folder."""
    return sorted(path.parent.name for path in runs.glob("*/run.json")) if runs.is_dir() else []
