"""Names of runs, told without loading the stages."""

from __future__ import annotations

from pathlib import Path


def run_names(runs: Path) -> list[str]:
    """Names of the runs in a folder."""
    return sorted(path.parent.name for path in runs.glob("*/run.json")) if runs.is_dir() else []
