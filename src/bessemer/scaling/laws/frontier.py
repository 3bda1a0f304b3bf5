"""Points that are each the best of their compute: N ∝ C^a and D ∝ C^b (Hoffmann et al. 2022, approach 1), and L of C."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.core.student_t import two_sided_quantile
from bessemer.scaling.laws.grid import HIGHEST, LOWEST, non_negative_least_squares
from bessemer.scaling.laws.points import DegenerateError, Points, Vector

#: Fewest points for L = E + K / C^γ, which has three numbers.
_LEAST_FOR_LOSS = 5


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · C^exponent, with the interval of the exponent."""

    exponent: float
    factor: float
    low: float
    high: float
    degrees_of_freedom: int

    def predict(self, flops: float) -> float:
        """y at C."""
        return float(self.factor * flops**self.exponent)


@dataclass(frozen=True)
class LossOfCompute:
    """L = E + K / C^γ along the frontier."""

    E: float
    K: float
    gamma: float

    def predict(self, flops: Vector | float) -> Vector:
        """L at C."""
        return np.asarray(self.E + self.K * np.asarray(flops, dtype=float) ** -self.gamma)


@dataclass(frozen=True)
class Frontier:
    """What the best models of growing compute say. loss: None below five points."""

    parameters: PowerLaw
    tokens: PowerLaw
    loss: LossOfCompute | None


def fit_frontier(points: Points, *, confidence: float = 0.9) -> Frontier:
    """Straight lines through the logarithms, with Student's intervals of their slopes.

    Raises DegenerateError below three points, or when they have the same compute.
    """
    if len(points) < 3:
        raise DegenerateError(f"too few points ({len(points)}): a power law with an interval needs at least 3")
    if np.ptp(np.log(points.flops)) < 0.1:
        raise DegenerateError("all points have the same compute: a power law in it needs at least two budgets")
    loss = fit_loss_of_compute(points) if len(points) >= _LEAST_FOR_LOSS else None
    return Frontier(
        fit_power_law(points.flops, points.parameters, confidence),
        fit_power_law(points.flops, points.tokens, confidence),
        loss,
    )


def fit_power_law(flops: Vector, values: Vector, confidence: float = 0.9) -> PowerLaw:
    """log y over log C by least squares. The interval: Student's t with n − 2 degrees of freedom."""
    x, y = np.log(flops), np.log(values)
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    intercept = float(y.mean() - slope * x.mean())
    residual = y - intercept - slope * x
    freedom = len(x) - 2
    error = float(np.sqrt(residual @ residual / freedom / (centred @ centred))) if freedom else float("inf")
    half = two_sided_quantile(confidence, freedom) * error if freedom else float("inf")
    return PowerLaw(slope, float(np.exp(intercept)), slope - half, slope + half, freedom)


def fit_loss_of_compute(points: Points) -> LossOfCompute:
    """L = E + K / C^γ: a grid over γ, made finer around the best, with non-negative least squares for (E, K) inside.

    Raises DegenerateError when γ ends at the border of the grid: the losses do not fall like a power of the compute.
    """
    x = np.log(points.flops)
    centre = x.mean()
    low, high = np.log(LOWEST), np.log(HIGHEST)
    grid = np.linspace(low, high, 200)
    for _ in range(20):
        columns = np.stack(np.broadcast_arrays(1.0, np.exp(-np.exp(grid[:, None]) * (x - centre))), axis=-1)
        columns = columns / points.loss[:, None]
        solution, reduction = non_negative_least_squares(np.einsum("gpi,gpj->gij", columns, columns), columns.sum(axis=1))
        best = int(np.argmax(reduction))
        spacing = grid[1] - grid[0]
        gamma = float(np.exp(grid[best]))
        floor, factor = map(float, solution[best])
        grid = np.linspace(max(low, grid[best] - spacing), min(high, grid[best] + spacing), 20)
    if factor == 0 or not 1.01 * LOWEST < gamma < HIGHEST / 1.01:
        raise DegenerateError("the losses do not fall like a power of the compute: no law fits them")
    return LossOfCompute(floor, factor * float(np.exp(gamma * centre)), gamma)
