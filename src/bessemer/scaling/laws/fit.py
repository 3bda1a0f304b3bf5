"""A fitted law with its resamples: its predictions, their intervals, and the file that keeps it.

Intervals are of a smoothed residual bootstrap (Efron and Tibshirani 1993, sections 9.2 and 16.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bessemer.core.errors import ConfigError
from bessemer.core.store import check_format, read_json, write_json
from bessemer.scaling.laws import grid, huber
from bessemer.scaling.laws.parametric import DegenerateError, ParametricLaw, Point, Points, Vector, check_determined

#: Parameters of the law: degrees of freedom that the residuals lose.
_UNKNOWNS = 5


@dataclass(frozen=True)
class Interval:
    """Central interval that holds a fraction `confidence` of the resamples."""

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


#: Format number of a law's file.
LAW_FORMAT = 1
Method = Literal["huber", "grid"]
#: How parameters are counted: every weight that a token meets, or those without the embedding and the head.
Count = Literal["all", "non-embedding"]

#: Smallest relative change of the loss between the points for which a term counts as determined.
_LEAST_EFFECT = 1e-3


@dataclass(frozen=True)
class Fit:
    """A law, the points that it was fitted to, and laws of resamples of them.

    count: how N is counted in the points. metric: what L is, as `bits_per_byte`.
    """

    method: Method
    law: ParametricLaw
    points: Points
    resamples: tuple[ParametricLaw, ...]
    count: Count = "all"
    metric: str = "loss"
    seed: int = 0

    def interval(self, quantity: Callable[[ParametricLaw], float], confidence: float = 0.9) -> Interval:
        """The bootstrap interval of anything that follows from the law."""
        return quantity_interval(self.resamples, quantity, confidence)

    def new_run_interval(self, parameters: float, tokens: float, confidence: float = 0.9) -> Interval:
        """The interval of the loss of one further run at N and D: the law's uncertainty and a run's own noise."""
        noise = draw_noise(self.points, self.law, (len(self.resamples),), np.random.default_rng([self.seed, 1]))
        laws = zip(self.resamples, noise, strict=True)
        return interval([float(law.predict(parameters, tokens) * np.exp(one)) for law, one in laws], confidence)

    @property
    def root_mean_square(self) -> float:
        """Root mean square of the residuals of log L: about the relative error at the fitted points."""
        left = residuals(self.points, self.law)
        return float(np.sqrt(np.mean(left**2)))


_FITS: dict[Method, Callable[[Points], ParametricLaw]] = {"huber": huber.fit_huber, "grid": grid.fit_grid}


def fit_law(
    points: Points,
    method: Method = "huber",
    *,
    resamples: int = 200,
    seed: int = 0,
    count: Count = "all",
    metric: str = "loss",
) -> Fit:
    """Fit the law and refit it to resamples. Raises DegenerateError, with the reason, for points that determine none."""
    check_determined(points)
    law = _FITS[method](points)
    _check_effects(points, law)
    losses = resampled_losses(points, law, resamples=resamples, seed=seed)
    laws = huber.refit_huber(points, losses, law) if method == "huber" else grid.refit_grid(points, losses)
    return Fit(method, law, points, tuple(laws), count, metric, seed)


def _check_effects(points: Points, law: ParametricLaw) -> None:
    """Raise DegenerateError when a term of the law is not there in the points, or its exponent is at no finite place."""
    terms = {
        "parameters": (law.A * points.parameters**-law.alpha, law.alpha),
        "tokens": (law.B * points.tokens**-law.beta, law.beta),
    }
    for name, (effect, exponent) in terms.items():
        if not np.isfinite(effect).all() or np.ptp(effect) < _LEAST_EFFECT * points.loss.min():
            raise DegenerateError(f"the losses do not fall with the {name}: no exponent can be given")
        if not 1.01 * grid.LOWEST < exponent < grid.HIGHEST / 1.01:
            raise DegenerateError(
                f"the best exponent of the {name} is {exponent:.3g}, at the border of what is searched: the points do not "
                "determine it; a wider range of them would"
            )


def write_fit(path: Path, fit: Fit) -> None:
    """Write a fit as JSON."""
    write_json(
        path,
        {
            "format": LAW_FORMAT,
            "method": fit.method,
            "count": fit.count,
            "metric": fit.metric,
            "seed": fit.seed,
            "law": asdict(fit.law),
            "points": [asdict(point) for point in fit.points.points],
            "resamples": [law.numbers() for law in fit.resamples],
        },
    )


def read_fit(path: Path) -> Fit:
    """Read what `write_fit` wrote. Raises ConfigError for any other file."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; `bessemer scaling fit … --out {path}` writes one")
    values: Any = read_json(path, "law")
    if not isinstance(values, dict) or "law" not in values:
        raise ConfigError(f"{path}: is not a law that `bessemer scaling fit --out` wrote")
    check_format(values.get("format"), LAW_FORMAT, path, "law")
    try:
        return Fit(
            values["method"],
            ParametricLaw(**values["law"]),
            Points(tuple(Point(**point) for point in values["points"])),
            tuple(ParametricLaw(*numbers) for numbers in values["resamples"]),
            values["count"],
            values["metric"],
            values["seed"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged ({error})") from None
