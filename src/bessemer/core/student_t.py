"""Student's t distribution for any positive degrees of freedom, by the regularised incomplete beta function."""

from __future__ import annotations

import math

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
