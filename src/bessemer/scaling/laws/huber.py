"""The law by Huber loss on logarithms and L-BFGS from a grid of starts (Hoffmann et al. 2022, section 3.3).

The objective is the *sum* over the points. The first published fit took the mean, whose small gradients ended the optimizer
before the minimum (Besiroglu et al. 2024, appendix A). L-BFGS solves many small problems at once: every start and every
bootstrap resample is a row of one array.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bessemer.scaling.laws.parametric import ParametricLaw, Points, Vector

#: (rows' values, rows' gradients) of some rows (their indices) at parameters of shape (rows, P).
Objective = Callable[[NDArray[np.intp], Vector], tuple[Vector, Vector]]

_SUFFICIENT_DECREASE, _CURVATURE = 1e-4, 0.9
_LINE_SEARCH_STEPS = 40


def minimise(
    objective: Objective, start: Vector, *, memory: int = 8, max_iterations: int = 500, tolerance: float = 1e-10
) -> tuple[Vector, Vector]:
    """(minimisers, values) of independent problems, each by L-BFGS (Liu and Nocedal 1989) from its row of `start` (S, P).

    The line search bisects for the weak Wolfe conditions, which also serves objectives with kinks (Lewis and Overton 2013). A
    row ends when a step lowers its value by less than `tolerance` of it, or no step lowers it.
    """
    x = start.astype(float).copy()
    active = np.arange(len(x))
    value, gradient = objective(active, x)
    steps: list[Vector] = []
    changes: list[Vector] = []
    for _ in range(max_iterations):
        if not len(active):
            break
        direction = -_inverse_hessian_product(gradient[active], [s[active] for s in steps], [y[active] for y in changes])
        uphill = np.sum(direction * gradient[active], axis=1) >= 0
        direction[uphill] = -gradient[active][uphill]
        moved, new_value, new_gradient = _line_search(objective, active, x[active], value[active], gradient[active], direction)
        step, change = np.zeros_like(x), np.zeros_like(x)
        step[active] = moved - x[active]
        change[active] = new_gradient - gradient[active]
        steps, changes = [*steps, step][-memory:], [*changes, change][-memory:]
        decrease = value[active] - new_value
        x[active], value[active], gradient[active] = moved, new_value, new_gradient
        active = active[decrease > tolerance * (np.abs(new_value) + tolerance)]
    return x, value


def _inverse_hessian_product(gradient: Vector, steps: list[Vector], changes: list[Vector]) -> Vector:
    """The two-loop recursion; a pair without positive curvature counts for nothing in its row."""
    q = gradient.copy()
    pairs = []
    scale = 1 / np.maximum(np.linalg.norm(gradient, axis=1), 1e-300)
    for step, change in zip(steps, changes, strict=True):
        curvature = np.sum(step * change, axis=1)
        good = curvature > 1e-14 * np.linalg.norm(step, axis=1) * np.linalg.norm(change, axis=1)
        inverse = np.where(good, 1 / np.where(good, curvature, 1), 0)
        squared = np.sum(change * change, axis=1)
        scale = np.where(good, curvature / np.where(good, squared, 1), scale)
        pairs.append((step, change, inverse))
    weights = []
    for step, change, inverse in reversed(pairs):
        weight = inverse * np.sum(step * q, axis=1)
        q -= weight[:, None] * change
        weights.append(weight)
    q *= scale[:, None]
    for (step, change, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q += (weight - inverse * np.sum(change * q, axis=1))[:, None] * step
    return q


def _line_search(
    objective: Objective, rows: NDArray[np.intp], x: Vector, value: Vector, gradient: Vector, direction: Vector
) -> tuple[Vector, Vector, Vector]:
    """A point of each row along its direction that satisfies the weak Wolfe conditions, or the lowest one that was tried."""
    slope = np.sum(gradient * direction, axis=1)
    length, low, high = np.ones(len(rows)), np.zeros(len(rows)), np.full(len(rows), np.inf)
    best_x, best_value, best_gradient = x.copy(), value.copy(), gradient.copy()
    searching = np.arange(len(rows))
    for _ in range(_LINE_SEARCH_STEPS):
        tried = x[searching] + length[searching, None] * direction[searching]
        tried_value, tried_gradient = objective(rows[searching], tried)
        limit = value[searching] + _SUFFICIENT_DECREASE * length[searching] * slope[searching]
        too_long = ~(tried_value <= limit)
        too_short = ~too_long & (np.sum(tried_gradient * direction[searching], axis=1) < _CURVATURE * slope[searching])
        better = ~too_long & (tried_value < best_value[searching])
        chosen = searching[better]
        best_x[chosen], best_value[chosen], best_gradient[chosen] = tried[better], tried_value[better], tried_gradient[better]
        high[searching[too_long]] = length[searching[too_long]]
        low[searching[too_short]] = length[searching[too_short]]
        searching = searching[too_long | too_short]
        if not len(searching):
            break
        bounded = np.isfinite(high[searching])
        length[searching] = np.where(bounded, (low[searching] + np.where(bounded, high[searching], 0)) / 2, 2 * low[searching])
    return best_x, best_value, best_gradient


#: Residuals of the logarithm of the loss beyond this count linearly.
DELTA = 1e-3
#: Starting points: E as a fraction of the lowest loss, each other term as a fraction of the mean loss, and both exponents.
_FLOORS, _TERMS, _EXPONENTS = (0.3, 0.6, 0.9), (0.05, 0.15, 0.4), (0.1, 0.3, 0.6, 1.0)
#: Bounds of E, A and B, so that a resample that determines nothing stays finite.
_LARGEST_LOG = 700.0
#: Starting points minimised together: a batch that fits the processor's cache.
_TOGETHER = 512


def fit_huber(points: Points) -> ParametricLaw:
    """The law with the lowest Huber loss over all starting points."""
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
