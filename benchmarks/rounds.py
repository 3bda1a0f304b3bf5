"""What repeated measurements come to in a result: every round, their median, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def summary(values: Iterable[float]) -> dict[str, Any]:
    """The rounds in their order, their median, and their spread: by how much of the smallest the largest exceeds it."""
    rounds = list(values)
    smallest = min(rounds)
    return {
        "median": statistics.median(rounds),
        "spread": max(rounds) / smallest - 1 if smallest > 0 else None,
        "rounds": rounds,
    }


def summaries(runs: Iterable[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The same for each of the figures that every run gives."""
    rounds = list(runs)
    return {key: summary(run[key] for run in rounds) for key in rounds[0]}
