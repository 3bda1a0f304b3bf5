"""From a loss to the accuracy on a task: L → a / (1 + e^(−k (L − L0))) + b (Bhagia et al. 2024, 2412.04403, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from bessemer.scaling.laws.parametric import DegenerateError, Vector

#: Grid of slopes, in units of 1 / the range of the losses, and the shares of the range that L0 may lie outside it.
_STEEPEST, _FLATTEST, _OUTSIDE = 60.0, 1.0, 0.5
_GRID, _REFINEMENTS = 33, 16


@dataclass(frozen=True)
class TaskLaw:
    """Accuracy of a task from its loss. a < 0 (or k < 0): a lower loss is a higher accuracy; b is that of a useless model,
    chance where it is fixed, and a + b that of a perfect one."""

    a: float
    k: float
    loss_0: float
    b: float

    def predict(self, loss: Vector | float) -> Vector:
        """The accuracy at a loss."""
        return np.asarray(self.a / (1 + np.exp(-self.k * (np.asarray(loss, dtype=float) - self.loss_0))) + self.b)


def fit_task_law(losses: Sequence[float], accuracies: Sequence[float]) -> TaskLaw:
    """The law of least squares: a grid over (k, L0), made finer around the best, with (a, b) solved inside.

    Raises DegenerateError below six points, for numbers that are not finite, and where the losses or the accuracies do not
    differ.
    """
    loss, accuracy = np.asarray(losses, dtype=float), np.asarray(accuracies, dtype=float)
    if len(loss) != len(accuracy) or len(loss) < 6:
        raise DegenerateError(
            f"{len(loss)} losses and {len(accuracy)} accuracies: at least 6 of each are needed for four numbers"
        )
    if not (np.isfinite(loss).all() and np.isfinite(accuracy).all()):
        raise DegenerateError("a loss or an accuracy is not a finite number")
    span = float(np.ptp(loss))
    if not span or not float(np.ptp(accuracy)):
        raise DegenerateError("the losses, or the accuracies, are all the same")
    centre = np.array([np.log(np.sqrt(_FLATTEST * _STEEPEST) / span), (loss.min() + loss.max()) / 2])
    reach = np.array([np.log(_STEEPEST / _FLATTEST) / 2, (0.5 + _OUTSIDE) * span])
    best = (np.inf, TaskLaw(0, 0, 0, 0))
    for _ in range(_REFINEMENTS):
        for log_k, place in product(*(np.linspace(-1, 1, _GRID)[:, None] * reach + centre).T):
            best = min(best, _solved(float(np.exp(log_k)), float(place), loss, accuracy), key=lambda one: one[0])
        centre = np.array([np.log(best[1].k), best[1].loss_0])
        reach = reach / 2
    return best[1]


def _solved(k: float, place: float, loss: Vector, accuracy: Vector) -> tuple[float, TaskLaw]:
    """(sum of squares, law) with the best a and b for a slope and a place."""
    rise = 1 / (1 + np.exp(-k * (loss - place)))
    centred = rise - rise.mean()
    spread = float(centred @ centred)
    a = float(centred @ accuracy) / spread if spread > 1e-12 else 0.0
    b = float(accuracy.mean() - a * rise.mean())
    residual = a * rise + b - accuracy
    return float(residual @ residual), TaskLaw(a, k, place, b)
