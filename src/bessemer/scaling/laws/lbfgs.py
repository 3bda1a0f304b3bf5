"""L-BFGS for many small problems at once: every start and every bootstrap resample is a row of one array."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bessemer.scaling.laws.points import Vector

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
