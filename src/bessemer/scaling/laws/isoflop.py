"""Power laws of compute (Hoffmann et al. 2022): N ∝ C^a and D ∝ C^b, by the frontier or by IsoFLOP parabolas.

Approach 1: points that are each the best of their compute, and the loss as a function of C. Approach 2: at each compute the N
of the lowest loss by a parabola, and a power law of these.

Parabolas are biased: loss over log N at fixed C is a sum of two exponentials, steeper on one side unless α = β, so the lowest
point of a parabola lies beside theirs, the further the wider the sizes reach. Where the sizes lie alike around the optimum of
every budget, N* is off by one factor and the exponent is right; elsewhere it is off too. `isoflop_bias` measures both on the
points' own sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.core.statistics import two_sided_quantile
from bessemer.scaling.laws.grid import HIGHEST, LOWEST, non_negative_least_squares
from bessemer.scaling.laws.parametric import DegenerateError, ParametricLaw, Point, Points, Vector

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
    """Power laws of the best models by compute. loss: None below five points."""

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


#: Points whose compute lies within this factor of the smallest belong to one budget.
_SAME_BUDGET = 1.15


@dataclass(frozen=True)
class Parabola:
    """Loss over log N at one compute: curvature (x − log N*)² + lowest loss, and the number of points."""

    flops: float
    parameters: float
    loss: float
    curvature: float
    points: Points

    def predict(self, parameters: float) -> float:
        """Loss at N."""
        return float(self.curvature * (np.log(parameters) - np.log(self.parameters)) ** 2 + self.loss)


@dataclass(frozen=True)
class IsoFlop:
    """The parabolas, and N* ∝ C^a through their lowest points. left_out: budgets without a minimum, each with its reason."""

    parabolas: tuple[Parabola, ...]
    parameters: PowerLaw
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class IsoFlopBias:
    """Bias of the parabolas under a law: their exponent minus the law's, and their N* over the law's at the largest compute."""

    exponent: float
    size: float


def budgets(points: Points) -> list[Points]:
    """The points by compute, in its order."""
    groups: list[list[Point]] = []
    first = 0.0
    for index in np.argsort(points.flops, kind="stable"):
        flops = float(points.flops[index])
        if not groups or flops > first * _SAME_BUDGET:
            groups.append([])
            first = flops
        groups[-1].append(points.points[index])
    return [Points(tuple(group)) for group in groups]


def fit_isoflop(points: Points, *, confidence: float = 0.9) -> IsoFlop:
    """A parabola for each budget of three sizes or more. Raises DegenerateError when fewer than three have a minimum."""
    parabolas, left_out = [], []
    for group in budgets(points):
        parabola = _parabola(group)
        if isinstance(parabola, Parabola):
            parabolas.append(parabola)
        else:
            left_out.append(f"{group.flops.mean():.2g} FLOPs: {parabola}")
    if len(parabolas) < 3:
        raise DegenerateError(
            f"{len(parabolas)} of {len(parabolas) + len(left_out)} compute budgets have a lowest loss between their sizes; "
            f"parabolas need 3{'; ' + left_out[0] if left_out else ''}"
        )
    flops = np.array([one.flops for one in parabolas])
    sizes = np.array([one.parameters for one in parabolas])
    return IsoFlop(tuple(parabolas), fit_power_law(flops, sizes, confidence), tuple(left_out))


def _parabola(points: Points) -> Parabola | str:
    """The parabola of one budget, or why there is none."""
    x = np.log(points.parameters)
    if len(np.unique(np.round(x, 3))) < 3:
        return "fewer than 3 sizes"
    curvature, slope, _ = np.polyfit(x - x.mean(), points.loss, 2)
    if curvature <= 0:
        return "the losses have no minimum"
    place = -slope / (2 * curvature)
    if not x.min() <= place + x.mean() <= x.max():
        return "the minimum lies outside the sizes"
    lowest = float(np.polyval(np.polyfit(x - x.mean(), points.loss, 2), place))
    return Parabola(
        float(np.exp(np.log(points.flops).mean())), float(np.exp(place + x.mean())), lowest, float(curvature), points
    )


def isoflop_bias(points: Points, law: ParametricLaw) -> IsoFlopBias:
    """What parabolas would get wrong on the points' sizes and tokens, without noise, if `law` were true.

    Raises DegenerateError where they give nothing.
    """
    losses = law.predict(points.parameters, points.tokens)
    noiseless = Points(
        tuple(
            Point(point.parameters, point.tokens, float(loss), point.flops)
            for point, loss in zip(points.points, losses, strict=True)
        )
    )
    power_law = fit_isoflop(noiseless).parameters
    largest = float(points.flops.max())
    return IsoFlopBias(power_law.exponent - law.parameters_exponent, power_law.predict(largest) / law.optimal(largest)[0])
