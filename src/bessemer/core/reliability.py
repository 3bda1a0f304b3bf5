"""Calibration of choices: whether a model is right as often as the probability of its choice says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bessemer.core.report import Cell, Column, Curves, Series, Table
from bessemer.core.statistics import Clusters, Estimate, mean_estimate, score

# Shapes: N items.

#: Usual since Guo et al. (2017).
BINS = 15


@dataclass(frozen=True)
class ReliabilityBin:
    """Items of similar confidence: the mean of that, and their accuracy."""

    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Reliability:
    """Expected calibration error, and the bins that it is of, from the least confident."""

    expected_calibration_error: float
    bins: Sequence[ReliabilityBin]


def choice_probability(log_likelihoods: ArrayLike) -> tuple[int, float]:
    """The likeliest choice of an item, the first of equals, and its probability among the choices: a softmax.

    log_likelihoods: of each choice, in nats, normalised by length or not. Raises ValueError for none and for one that is not
    finite.
    """
    values = np.asarray(log_likelihoods, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("choices need finite log-likelihoods, at least one")
    chosen = int(values.argmax())
    return chosen, float(1 / np.exp(values - values[chosen]).sum())


def reliability(
    confidences_N: ArrayLike, correct_N: ArrayLike, *, bins: int = BINS, clusters_N: Clusters | None = None
) -> Reliability:
    """Expected calibration error, Σ_b n_b / N · |accuracy_b − confidence_b|, over bins of equally many items.

    confidences: the probability of each item's choice; correct: whether it was right, 0 or 1. Bins of one width (Guo et al.
    2017) leave most items of a sure model in the last; with equal mass each is as well measured (Nguyen and O'Connor 2015).
    Items of equal confidence stay together, so bins are equal up to that, fewer where there are fewer values.

    The error of a perfectly calibrated model is above 0, by about √(2 p (1 − p) b / (π N)) with b bins of accuracy p: compare
    models at one N. Raises ValueError for no items, other numbers of both, and confidences outside 0 … 1.
    """
    confidences, correct = np.asarray(confidences_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    if confidences.ndim != 1 or confidences.shape != correct.shape or not len(confidences):
        raise ValueError(f"each confidence needs its outcome, got {confidences.shape} and {correct.shape}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ValueError("confidences lie between 0 and 1")
    if bins < 1:
        raise ValueError(f"at least one bin, not {bins}")
    _, of_equal, counts = np.unique(confidences, return_inverse=True, return_counts=True)
    # by the middle of the places that equal confidences take
    bin_of_equal = ((np.cumsum(counts) - counts / 2) * bins / len(confidences)).astype(np.int64)
    bin_N = bin_of_equal[of_equal]
    error, found = 0.0, []
    for number in np.unique(bin_N):
        inside = np.flatnonzero(bin_N == number)
        names = None if clusters_N is None else [clusters_N[index] for index in inside.tolist()]
        accuracy, confidence = mean_estimate(correct[inside], names), float(confidences[inside].mean())
        error += len(inside) / len(confidences) * abs(accuracy.mean - confidence)
        found.append(ReliabilityBin(confidence, accuracy))
    return Reliability(error, found)


def reliability_table(found: Reliability) -> Table:
    """A row a bin: items, mean confidence, accuracy with its interval."""
    rows: list[list[str | Cell]] = [
        [f"{one.accuracy.items:,}", f"{one.confidence:.3f}", score(one.accuracy), f"{one.accuracy.mean - one.confidence:+.3f}"]
        for one in found.bins
    ]
    return Table([Column(heading, True) for heading in ("Items", "Confidence", "Accuracy", "Difference")], rows)


def reliability_curves(found: dict[str, Reliability]) -> Curves:
    """The reliability plot of some models, by name: accuracy over confidence, beside the diagonal where both are equal."""
    series = [Series("calibrated", [0.0, 1.0], [0.0, 1.0])]
    for name, of_one in found.items():
        series.append(Series(name, [one.confidence for one in of_one.bins], [one.accuracy.mean for one in of_one.bins]))
    return Curves(series, "accuracy", x_label="confidence", wide=False, from_zero=True)
