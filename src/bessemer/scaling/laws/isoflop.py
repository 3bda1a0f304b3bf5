"""IsoFLOP parabolas (Hoffmann et al. 2022, approach 2): at each compute the N of the lowest loss, and a power law of these.

Biased: loss over log N at fixed C is a sum of two exponentials, steeper on one side unless α = β, and a parabola through points
to both sides has its lowest point beside theirs, the further the wider the sizes reach. Where the sizes lie alike around the
optimum of every budget, N* is off by one factor and the exponent is right; where they do not, it is off too. `isoflop_bias`
measures both on the points' own sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.scaling.laws.frontier import PowerLaw, fit_power_law
from bessemer.scaling.laws.parametric import ParametricLaw
from bessemer.scaling.laws.points import DegenerateError, Point, Points

#: Computes within this factor of the smallest are one budget.
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
    """How far parabolas miss a law: their exponent less its own, and their N* over its own at the largest compute."""

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
        found = _parabola(group)
        if isinstance(found, Parabola):
            parabolas.append(found)
        else:
            left_out.append(f"{group.flops.mean():.2g} FLOPs: {found}")
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
    found = fit_isoflop(noiseless).parameters
    largest = float(points.flops.max())
    return IsoFlopBias(found.exponent - law.parameters_exponent, found.predict(largest) / law.optimal(largest)[0])
