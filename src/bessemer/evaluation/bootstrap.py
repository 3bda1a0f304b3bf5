"""Paired bootstrap intervals of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models' scores, and its confidence interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    scores: Sequence[float],
    other_scores: Sequence[float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Percentile bootstrap of the mean difference of scores on the same items (Efron and Tibshirani 1993, section 13.3).

    Items are resampled with replacement, both models' scores of an item together, so that an item's difficulty cancels. Raises
    ValueError when the two have different lengths or no items.
    """
    if len(scores) != len(other_scores) or not scores:
        raise ValueError(f"paired scores must be as many and at least one, got {len(scores)} and {len(other_scores)}")
    differences = np.asarray(scores, float) - np.asarray(other_scores, float)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        drawn = random.integers(0, len(differences), (min(_RESAMPLES_AT_ONCE, resamples - start), len(differences)))
        means.append(differences[drawn].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high))
