"""Statistics of scores: means with clustered and paired intervals, corrected for many tests, and calibration.

Items of an evaluation are a sample from the questions that could have been asked; an interval is about those (Miller 2024,
arXiv 2411.00640). Intervals are Student's t, for any positive degrees of freedom, by the regularised incomplete beta function.
Calibration is whether a model is right as often as the probability of its choice says (Guo et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bessemer.core.report import Cell, Column, Curves, Series, Table

# Shapes: N items, C clusters, M tests.

Clusters = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over N items in C clusters, its standard error and the degrees of freedom of that.

    clusters is N where items are independent. standard_error is infinite for a single cluster, which says nothing about the
    spread.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    items: int
    clusters: int

    def interval(self, confidence: float = 0.95, bounds: tuple[float, float] | None = None) -> tuple[float, float]:
        """mean ± t · standard error, with Student's t at `degrees_of_freedom`.

        bounds: the lowest and the highest possible score; the interval is cut to them. When all clusters are equal, the
        standard error is 0 although other clusters may differ. With bounds, the interval then allows a share of
        1 − ((1 − confidence) / 2)^(1/C) of all clusters to have the extreme score: a sample of C clusters may contain none of
        them (Clopper and Pearson 1934).

        Raises ValueError for a confidence outside (0, 1).
        """
        if math.isinf(self.standard_error):
            return bounds or (-math.inf, math.inf)
        half = two_sided_quantile(confidence, self.degrees_of_freedom) * self.standard_error
        if bounds is None:
            return self.mean - half, self.mean + half
        low, high = bounds
        if self.standard_error == 0:
            unseen = 1 - ((1 - confidence) / 2) ** (1 / self.clusters)
            return self.mean - unseen * (self.mean - low), self.mean + unseen * (high - self.mean)
        return max(self.mean - half, low), min(self.mean + half, high)

    @property
    def p_value(self) -> float:
        """Two-sided p value of the mean being 0, by the t test.

        When all clusters are equal and not 0, it is that of the sign test, 2^(1 − C): the t test would give 0.
        """
        if self.mean == 0 or math.isinf(self.standard_error):
            return 1.0
        if self.standard_error == 0:
            return 2.0 ** (1 - self.clusters)
        return two_sided_p(self.mean / self.standard_error, self.degrees_of_freedom)


def mean_estimate(scores_N: ArrayLike, clusters_N: Clusters | None = None) -> Estimate:
    """Mean of scores, with a standard error for items that come in clusters (several questions on one passage).

    With residuals r = s − s̄ and C clusters,

        SE² = C / (C − 1) · 1/N² · Σ_c (Σ_{i in c} r_i)²

    Without clusters each item is its own: SE² = Σ r² / (N (N − 1)). Expanded, this is Miller's equation 4 with the usual
    correction for few clusters (Cameron and Miller 2015, section VI.B). Degrees of freedom are C − 1 for clusters of one size,
    and fewer for others (Bell and McCaffrey 2002): one passage with half of all questions leaves little to learn the spread
    from.

    scores may be means over several samples of an item, or its pass@k: the variance between items includes that within them.
    Raises ValueError for no scores, for one that is not finite, and for clusters of another number.
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores are a row of at least one number, got the shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    mean = float(scores.mean())
    # exactly 0 when all scores are equal, whatever the rounding of the mean
    residuals_N = np.zeros_like(scores) if (scores == scores[0]).all() else scores - mean
    sums_C = residuals_N if clusters_N is None else _cluster_sums(residuals_N, clusters_N)
    count = len(sums_C)
    if count == 1:
        return Estimate(mean, math.inf, 1, len(scores), 1)
    variance = count / (count - 1) * float(sums_C @ sums_C) / len(scores) ** 2
    sizes_C = np.ones(count) if clusters_N is None else _cluster_sums(np.ones_like(scores), clusters_N)
    return Estimate(mean, math.sqrt(variance), _degrees_of_freedom(sizes_C), len(scores), count)


def _degrees_of_freedom(sizes_C: np.ndarray) -> float:
    """tr(B)² / tr(B²) of the quadratic form u'Bu that SE² is in the clusters' means u, were items of a cluster all alike.

    With weights w = n_c / N and D = diag(w): B = (I − w1')D²(I − 1w'). C − 1 for clusters of one size.
    """
    weights_C = sizes_C / sizes_C.sum()
    second, third, fourth, fifth = (float((weights_C**power).sum()) for power in (2, 3, 4, 5))
    trace = second - 2 * third + second**2
    trace_of_square = fourth - 4 * fifth + 4 * second * fourth + 2 * third**2 - 4 * second**2 * third + second**4
    return trace**2 / trace_of_square


def _cluster_sums(values_N: np.ndarray, clusters_N: Clusters) -> np.ndarray:
    if len(clusters_N) != len(values_N):
        raise ValueError(f"each score needs its cluster, got {len(values_N)} scores and {len(clusters_N)} clusters")
    numbers: dict[Hashable, int] = {}
    index_N = np.fromiter((numbers.setdefault(name, len(numbers)) for name in clusters_N), dtype=np.int64, count=len(values_N))
    return np.bincount(index_N, weights=values_N)


def paired_difference(scores_N: ArrayLike, other_N: ArrayLike, clusters_N: Clusters | None = None) -> Estimate:
    """Mean of `scores − other` over the same items (Miller 2024, section 4.2): the difficulty of items cancels.

    The standard error of two independent means would be too large, because it ignores the covariance:
    Var(a − b) = Var(a) + Var(b) − 2 Cov(a, b). Raises ValueError for scores of different numbers, and as `mean_estimate`.
    """
    scores, other = np.asarray(scores_N, dtype=np.float64), np.asarray(other_N, dtype=np.float64)
    if scores.shape != other.shape:
        raise ValueError(f"paired scores must be as many, got {scores.shape} and {other.shape}")
    return mean_estimate(scores - other, clusters_N)


_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class BootstrapDifference:
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
) -> BootstrapDifference:
    """Percentile bootstrap of the mean difference of scores on the same items (Efron and Tibshirani 1993, section 13.3).

    Items are resampled with replacement, both models' scores of an item together, so that an item's difficulty cancels. Raises
    ValueError when the two have different lengths or no items.
    """
    if len(scores) != len(other_scores) or not scores:
        raise ValueError(f"paired scores must be as many and at least one, got {len(scores)} and {len(other_scores)}")
    differences = np.asarray(scores, float) - np.asarray(other_scores, float)
    random = np.random.default_rng(seed)
    means = []
    # some at a time, which bounds memory
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        drawn = random.integers(0, len(differences), (min(_RESAMPLES_AT_ONCE, resamples - start), len(differences)))
        means.append(differences[drawn].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return BootstrapDifference(float(differences.mean()), float(low), float(high))


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean of independent estimates, those of several tasks: SE² = Σ SE_t² / T².

    Degrees of freedom by Welch and Satterthwaite: (Σ SE_t²)² / Σ (SE_t⁴ / ν_t). Raises ValueError for none.
    """
    if not estimates:
        raise ValueError("a mean needs at least one estimate")
    variances = np.array([estimate.standard_error**2 for estimate in estimates])
    freedoms = np.array([estimate.degrees_of_freedom for estimate in estimates])
    total = float(variances.sum())
    spread = float((variances**2 / freedoms).sum())
    return Estimate(
        float(np.mean([estimate.mean for estimate in estimates])),
        math.sqrt(total) / len(estimates),
        total**2 / spread if 0 < spread < math.inf else float(freedoms.sum()),
        sum(estimate.items for estimate in estimates),
        sum(estimate.clusters for estimate in estimates),
    )


def score(estimate: Estimate) -> str:
    """A mean score, of 0 to 1, with its 95 % interval: `0.523 [0.498, 0.548]`."""
    low, high = estimate.interval(bounds=(0.0, 1.0))
    return f"{estimate.mean:.3f} [{low:.3f}, {high:.3f}]"


def holm(p_values_M: ArrayLike) -> np.ndarray:
    """p values adjusted for M tests, (M,), by Holm's step-down method (Holm 1979).

    The k-th smallest is multiplied by M − k + 1, and is at least the one before it. Rejecting what is at most 0.05 then rejects
    a true hypothesis, any of them, with probability at most 0.05, however the tests depend on each other. Raises ValueError
    for a p value outside [0, 1].
    """
    p_values = np.asarray(p_values_M, dtype=np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError("p values lie between 0 and 1")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return adjusted


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
    """Expected calibration error, and its bins, from the least confident."""

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
    # items of equal confidence go to the bin of their middle rank
    bin_of_equal = ((np.cumsum(counts) - counts / 2) * bins / len(confidences)).astype(np.int64)
    bin_N = bin_of_equal[of_equal]
    error, filled = 0.0, []
    for number in np.unique(bin_N):
        inside = np.flatnonzero(bin_N == number)
        names = None if clusters_N is None else [clusters_N[index] for index in inside.tolist()]
        accuracy, confidence = mean_estimate(correct[inside], names), float(confidences[inside].mean())
        error += len(inside) / len(confidences) * abs(accuracy.mean - confidence)
        filled.append(ReliabilityBin(confidence, accuracy))
    return Reliability(error, filled)


def reliability_table(result: Reliability) -> Table:
    """A row a bin: items, mean confidence, accuracy with its interval."""
    rows: list[list[str | Cell]] = [
        [f"{one.accuracy.items:,}", f"{one.confidence:.3f}", score(one.accuracy), f"{one.accuracy.mean - one.confidence:+.3f}"]
        for one in result.bins
    ]
    return Table([Column(heading, True) for heading in ("Items", "Confidence", "Accuracy", "Difference")], rows)


def reliability_curves(results: dict[str, Reliability]) -> Curves:
    """The reliability plot of some models, by name: accuracy over confidence, with the diagonal where both are equal."""
    series = [Series("calibrated", [0.0, 1.0], [0.0, 1.0])]
    for name, of_one in results.items():
        series.append(Series(name, [one.confidence for one in of_one.bins], [one.accuracy.mean for one in of_one.bins]))
    return Curves(series, "accuracy", x_label="confidence", wide=False, from_zero=True)


_TINY = 1e-300
_PRECISION = 1e-15
_MOST_TERMS = 10_000


def two_sided_p(t: float, degrees_of_freedom: float) -> float:
    """Probability of a |T| of at least |t|: I_x(ν/2, 1/2) with x = ν / (ν + t²) (DLMF 8.17, Abramowitz and Stegun 26.7.1).

    t may be infinite. Raises ValueError for degrees of freedom that are not positive.
    """
    if not degrees_of_freedom > 0:
        raise ValueError(f"degrees of freedom must be positive, got {degrees_of_freedom}")
    if math.isinf(t):
        return 0.0
    square = t * t
    if square <= degrees_of_freedom:
        return 1 - _incomplete_beta(square / (degrees_of_freedom + square), 0.5, degrees_of_freedom / 2)
    return _incomplete_beta(degrees_of_freedom / (degrees_of_freedom + square), degrees_of_freedom / 2, 0.5)


def two_sided_quantile(confidence: float, degrees_of_freedom: float) -> float:
    """The t for which |T| ≤ t has probability `confidence`, by bisection: 1.96 for 0.95 and many degrees of freedom.

    Raises ValueError for a confidence outside (0, 1) and degrees of freedom that are not positive.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees_of_freedom) > 1 - confidence:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        if two_sided_p(middle, degrees_of_freedom) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), which converges fast where x < (a + 1) / (a + b + 2)."""
    if x == 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    log_factor = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_factor) / a * _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: float, b: float) -> float:
    """1/(1 + d₁/(1 + d₂/(1 + …))) by Lentz's method (Lentz 1976): ratios of successive numerators and denominators."""
    fraction, numerators, denominators = 1.0, math.inf, 1.0
    for index in range(1, _MOST_TERMS):
        half = index // 2
        if index % 2:
            term = -(a + half) * (a + b + half) * x / ((a + index - 1) * (a + index))
        else:
            term = half * (b - half) * x / ((a + index - 1) * (a + index))
        numerators = (1 + term / numerators) or _TINY
        denominators = 1 / ((1 + term * denominators) or _TINY)
        fraction *= numerators * denominators
        if abs(numerators * denominators - 1) < _PRECISION:
            break
    return fraction
