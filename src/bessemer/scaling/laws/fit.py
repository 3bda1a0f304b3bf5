"""A fitted law with its resamples: what it says, how sure it is, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bessemer.core.errors import ConfigError
from bessemer.core.store import check_format, read_json, write_json
from bessemer.scaling.laws import grid, huber
from bessemer.scaling.laws.bootstrap import Interval, draw_noise, interval, quantity_interval, resampled_losses, residuals
from bessemer.scaling.laws.parametric import ParametricLaw
from bessemer.scaling.laws.points import DegenerateError, Point, Points, check_determined

#: Format number of a law's file.
LAW_FORMAT = 1
Method = Literal["huber", "grid"]
#: How parameters are counted: every weight that a token meets, or those without the embedding and the head.
Count = Literal["all", "non-embedding"]

#: A term that changes the loss by less than this share between the points is not seen in them.
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
        """Of the residuals of log L: about the relative error at the fitted points."""
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
    """Keep a fit as JSON."""
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
    """A fit that `write_fit` kept. Raises ConfigError for a file that is none."""
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
