"""The law by Huber loss on logarithms and L-BFGS from a grid of starts (Hoffmann et al. 2022, section 3.3).

The objective is the *sum* over the points. The first published fit took the mean, whose small gradients ended the optimizer
before the minimum (Besiroglu et al. 2024, appendix A).
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from bessemer.scaling.laws.lbfgs import Objective, minimise
from bessemer.scaling.laws.parametric import ParametricLaw
from bessemer.scaling.laws.points import Points, Vector

#: Residuals of the logarithm of the loss beyond this count linearly.
DELTA = 1e-3
#: Starts: shares of the lowest loss that E has, of the mean loss that each of the other terms has, and both exponents.
_FLOORS, _TERMS, _EXPONENTS = (0.3, 0.6, 0.9), (0.05, 0.15, 0.4), (0.1, 0.3, 0.6, 1.0)
#: Of E, A and B: a resample that determines nothing stays finite.
_LARGEST_LOG = 700.0
#: Most starts that are followed together: a batch that fits the processor's cache.
_TOGETHER = 512


def fit_huber(points: Points) -> ParametricLaw:
    """The law of the lowest Huber loss over all starts."""
    floor, mean = points.loss.min(), np.exp(np.log(points.loss).mean())
    starts = np.array(
        [
            (np.log(e * floor), np.log(a * mean), np.log(b * mean), alpha, beta)
            for e, a, b, alpha, beta in product(_FLOORS, _TERMS, _TERMS, _EXPONENTS, _EXPONENTS)
        ]
    )
    targets = np.broadcast_to(np.log(points.loss), (len(starts), len(points)))
    found, values = minimise(_objective(points, targets), starts)
    return _law(points, found[np.argmin(values)])


def refit_huber(points: Points, losses: Vector, start: ParametricLaw) -> list[ParametricLaw]:
    """The laws of resamples of the losses (S, points), each from the law of the points themselves."""
    laws = []
    for first in range(0, len(losses), _TOGETHER):
        some = np.log(losses[first : first + _TOGETHER])
        starts = np.tile(_numbers(points, start), (len(some), 1))
        laws += [_law(points, row) for row in minimise(_objective(points, some), starts)[0]]
    return laws


def _centre(points: Points) -> tuple[float, float]:
    """Mean log N and log D. Measured from there, terms and exponents barely depend on each other, and a small grid of starts
    suffices; the objective is the same."""
    return float(np.log(points.parameters).mean()), float(np.log(points.tokens).mean())


def _numbers(points: Points, law: ParametricLaw) -> Vector:
    n, d = _centre(points)
    return np.array(
        [np.log(law.E), np.log(law.A) - law.alpha * n, np.log(law.B) - law.beta * d, law.alpha, law.beta],
    )


def _law(points: Points, numbers: Vector) -> ParametricLaw:
    n, d = _centre(points)
    e, a, b, alpha, beta = map(float, numbers)
    logs = np.minimum([e, a + alpha * n, b + beta * d], _LARGEST_LOG)
    floor, of_parameters, of_tokens = map(float, np.exp(logs))
    return ParametricLaw(floor, of_parameters, of_tokens, alpha, beta)


def _objective(points: Points, targets_SP: Vector) -> Objective:
    """Σ Huber(log L − log-sum-exp(e, a − α n, b − β d)) / δ² and its gradient. targets_SP: log losses of each problem."""
    centre_n, centre_d = _centre(points)
    n_P, d_P = np.log(points.parameters) - centre_n, np.log(points.tokens) - centre_d

    def objective(rows: NDArray[np.intp], x: Vector) -> tuple[Vector, Vector]:
        e, a, b, alpha, beta = (x[:, column, None] for column in range(5))
        terms = np.stack(np.broadcast_arrays(e, a - alpha * n_P, b - beta * d_P))
        largest = terms.max(axis=0)
        powers = np.exp(terms - largest)
        total = powers.sum(axis=0)
        residual = (largest + np.log(total) - targets_SP[rows]) / DELTA
        small = np.abs(residual) <= 1
        values = np.where(small, residual**2 / 2, np.abs(residual) - 0.5).sum(axis=1)
        slope = np.where(small, residual, np.sign(residual)) / DELTA
        by_e, by_a, by_b = slope * powers / total
        gradient = np.stack([by_e.sum(1), by_a.sum(1), by_b.sum(1), -(by_a * n_P).sum(1), -(by_b * d_P).sum(1)], axis=1)
        return values, gradient

    return objective
