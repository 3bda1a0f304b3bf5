"""Intervals of a law by a smoothed residual bootstrap (Efron and Tibshirani 1993, sections 9.2 and 16.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bessemer.scaling.laws.parametric import ParametricLaw
from bessemer.scaling.laws.points import Points, Vector

#: Numbers that the law has, and the residuals do not have any more.
_UNKNOWNS = 5


@dataclass(frozen=True)
class Interval:
    """What a share `confidence` of the resamples lies in, its ends left out alike."""

    low: float
    high: float
    confidence: float


def interval(values: Sequence[float] | Vector, confidence: float) -> Interval:
    """The interval of resampled values; those that are not finite count as the largest."""
    finite = np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(finite, [tail, 100 - tail], method="nearest")
    return Interval(float(low), float(high), confidence)


def residuals(points: Points, law: ParametricLaw) -> Vector:
    """log L − log L̂ of each point."""
    return np.asarray(np.log(points.loss) - np.log(law.predict(points.parameters, points.tokens)))


def draw_noise(points: Points, law: ParametricLaw, shape: tuple[int, ...], random: np.random.Generator) -> Vector:
    """Noise of log L, as the residuals have it: one of them at random, with a normal deviate added.

    A fit's residuals are smaller than the noise; n / (n − 5) makes up for it and, as the jackknife does, for the points that
    pull the law towards themselves. The normal deviate, of the width of a kernel density estimate (1.06 σ n^(−1/5)), is there
    because a law of the least absolute residuals goes through five of its points: a distribution with five zeros would make its
    intervals too narrow.
    """
    left = residuals(points, law)
    count = len(points)
    spread = float(np.sqrt(left @ left / (count - _UNKNOWNS)))
    wide = (left - left.mean()) * count / (count - _UNKNOWNS)
    return random.choice(wide, shape) + 1.06 * spread * count**-0.2 * random.standard_normal(shape)


def resampled_losses(points: Points, law: ParametricLaw, *, resamples: int, seed: int) -> Vector:
    """Losses of the same N and D as `law` and the noise of its residuals would give them, (resamples, points)."""
    noise = draw_noise(points, law, (resamples, len(points)), np.random.default_rng(seed))
    return np.asarray(law.predict(points.parameters, points.tokens) * np.exp(noise))


def quantity_interval(laws: Sequence[ParametricLaw], quantity: Callable[[ParametricLaw], float], confidence: float) -> Interval:
    """The interval of anything that follows from a law."""
    with np.errstate(over="ignore", invalid="ignore"):
        return interval([quantity(law) for law in laws], confidence)
