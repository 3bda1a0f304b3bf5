"""The law by a grid over (α, β), with non-negative least squares for (E, A, B) inside (variable projection, "VPNLS").

Given the exponents the law is linear, so only two numbers are searched and the result does not depend on starts. Least squares
of the relative residuals (L̂ − L) / L, which for small ones are those of the logarithm.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from bessemer.scaling.laws.parametric import ParametricLaw, Points, Vector

#: Exponents that are searched.
LOWEST, HIGHEST = 0.01, 3.0
#: Points of an axis of the first grid, and of the finer ones around the best point so far.
_COARSE, _FINE = 20, 7
#: Each finer grid has half the spacing: after these the exponents are known to 1e-6 of themselves.
_REFINEMENTS = 18
#: Resamples that are searched together.
_TOGETHER = 64


def fit_grid(points: Points) -> ParametricLaw:
    """The law with the least sum of squares."""
    return refit_grid(points, points.loss[None])[0]


def refit_grid(points: Points, losses: Vector) -> list[ParametricLaw]:
    """The laws of resamples of the losses (S, points)."""
    laws: list[ParametricLaw] = []
    for first in range(0, len(losses), _TOGETHER):
        laws += _search(points, losses[first : first + _TOGETHER])
    return laws


def _search(points: Points, losses_SP: Vector) -> list[ParametricLaw]:
    n, d = np.log(points.parameters), np.log(points.tokens)
    centre_n, centre_d = n.mean(), d.mean()
    axis = np.linspace(np.log(LOWEST), np.log(HIGHEST), _COARSE)
    spacing = axis[1] - axis[0]
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    best = _best(grid[None], n - centre_n, d - centre_d, losses_SP)[0]
    offsets = np.arange(_FINE) - _FINE // 2
    fine = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1).reshape(-1, 2)
    for _ in range(_REFINEMENTS):
        spacing /= 2
        candidates = np.clip(best[:, None] + spacing * fine, np.log(LOWEST), np.log(HIGHEST))
        best, weights = _best(candidates, n - centre_n, d - centre_d, losses_SP)
    laws = []
    for (alpha, beta), (floor, a, b) in zip(np.exp(best), weights, strict=True):
        laws.append(
            ParametricLaw(
                float(floor),
                float(a * np.exp(alpha * centre_n)),
                float(b * np.exp(beta * centre_d)),
                float(alpha),
                float(beta),
            )
        )
    return laws


def _best(exponents: Vector, n: Vector, d: Vector, losses_SP: Vector) -> tuple[Vector, Vector]:
    """Of candidates (S or 1, G, 2) of log exponents each resample's best, (S, 2), and its (E, A, B), (S, 3)."""
    powers = np.exp(exponents)
    columns = np.stack(np.broadcast_arrays(1.0, np.exp(-powers[..., :1] * n), np.exp(-powers[..., 1:] * d)), axis=-1)
    relative = columns / losses_SP[:, None, :, None]  # (S, G, P, 3)
    normal = relative.swapaxes(-1, -2) @ relative
    solution, reduction = non_negative_least_squares(normal, relative.sum(axis=2))
    chosen = np.argmax(reduction, axis=1)
    rows = np.arange(len(losses_SP))
    candidates = np.broadcast_to(exponents, (len(losses_SP), *exponents.shape[1:]))
    return candidates[rows, chosen], solution[rows, chosen]


def non_negative_least_squares(normal: Vector, right: Vector) -> tuple[Vector, Vector]:
    """min ‖X w − y‖² over w ≥ 0, exactly: (w, ‖y‖² − the minimum).

    normal: XᵀX, (…, K, K); right: Xᵀy, (…, K). Where the solution without the bound is negative somewhere, every set of columns
    is tried, which for the few columns of a law is the whole search.
    """
    shape, unknowns = right.shape, right.shape[-1]
    normal, right = normal.reshape(-1, unknowns, unknowns), right.reshape(-1, unknowns)
    best, reduction = np.zeros_like(right), np.zeros(len(right))
    rows = np.arange(len(right))
    for size in range(unknowns, 0, -1):
        for support in combinations(range(unknowns), size):
            index = np.array(support)
            weights = _solve(normal[rows[:, None, None], index[:, None], index], right[rows[:, None], index])
            gained = (weights * right[rows[:, None], index]).sum(axis=-1)
            better = (weights >= 0).all(axis=-1) & (gained > reduction[rows])
            chosen = rows[better]
            best[chosen] = 0
            best[chosen[:, None], index] = weights[better]
            reduction[chosen] = gained[better]
        if size == unknowns:
            rows = rows[reduction[rows] == 0]
    return best.reshape(shape), reduction.reshape(shape[:-1])


def _solve(normal: Vector, right: Vector) -> Vector:
    """The weights of normal equations, columns scaled to one length."""
    scale = np.sqrt(np.einsum("...ii->...i", normal))
    scaled = normal / (scale[..., :, None] * scale[..., None, :]) + 1e-14 * np.eye(right.shape[-1])
    return np.asarray(np.linalg.solve(scaled, (right / scale)[..., None])[..., 0] / scale)
