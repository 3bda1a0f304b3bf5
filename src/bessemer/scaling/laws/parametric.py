"""L = E + A/N^α + B/D^β (Hoffmann et al. 2022, eq. 2), the measured points that it is fitted to, and what follows from it.

Points that do not determine the five numbers are refused with the reason. Where data are repeated, D tokens of which U are
different, the law is that of Muennighoff et al. 2023 (2305.16264). `TaskLaw` goes from a loss to the accuracy on a task.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bessemer.core.config import nearest
from bessemer.core.errors import BessemerError

Vector = NDArray[np.float64]

#: FLOPs of training a dense model are about this many times N D (Kaplan et al. 2020, section 2.1).
FLOPS_PER_PARAMETER_TOKEN = 6
#: Columns of a CSV with another name in the field.
_COLUMNS = {"parameters": ("parameters", "params", "n"), "tokens": ("tokens", "d"), "loss": ("loss", "bits_per_byte")}


class DegenerateError(BessemerError):
    """Points that determine no law. Its text is the reason."""


@dataclass(frozen=True)
class Point:
    """One trained model. flops: of its training; 6 N D where they are not given."""

    parameters: float
    tokens: float
    loss: float
    flops: float | None = None

    def problem(self) -> str | None:
        """Why the numbers are no measured run; None when they are finite and positive."""
        for name in ("parameters", "tokens", "loss", "flops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                return f"{name} is {value:g}; it must be a finite number above 0"
        return None


@dataclass(frozen=True)
class Points:
    """Points as vectors of one length. Raises DegenerateError for a number that is not finite and positive."""

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        for number, point in enumerate(self.points, start=1):
            if (problem := point.problem()) is not None:
                raise DegenerateError(f"point {number}: {problem}")

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def parameters(self) -> Vector:
        """N of each point."""
        return np.array([point.parameters for point in self.points])

    @cached_property
    def tokens(self) -> Vector:
        """D of each point."""
        return np.array([point.tokens for point in self.points])

    @cached_property
    def loss(self) -> Vector:
        """L of each point."""
        return np.array([point.loss for point in self.points])

    @cached_property
    def flops(self) -> Vector:
        """C of each point."""
        return np.array([point.flops or FLOPS_PER_PARAMETER_TOKEN * point.parameters * point.tokens for point in self.points])


def check_determined(points: Points, *, unknowns: int = 5) -> None:
    """Raise DegenerateError unless points of a law in N and D determine its five numbers.

    Two points more than numbers, three values of N and of D, and N and D that do not grow in proportion.
    """
    least = unknowns + 2
    if len(points) < least:
        raise DegenerateError(
            f"too few points ({len(points)}) for the {unknowns} numbers of "
            f"L = E + A/N^α + B/D^β: at least {least} are needed; of points that are each the best of their "
            "compute, --optimal fits less"
        )
    for name, values in (("parameters", points.parameters), ("tokens", points.tokens)):
        distinct = len(np.unique(np.round(np.log(values), 3)))
        if distinct < 3:
            raise DegenerateError(f"different {name} of the points: {distinct}; an exponent needs at least 3")
    correlation = np.corrcoef(np.log(points.parameters), np.log(points.tokens))[0, 1]
    if abs(correlation) > 0.995:
        raise DegenerateError(
            f"parameters and tokens move together (correlation of their logarithms {correlation:.3f}), so their effects "
            "cannot be told apart: train some sizes on more and fewer tokens, or say --optimal"
        )


def read_points(path: Path, *, count: str = "all") -> Points:
    """Points of a CSV with the columns `parameters`, `tokens`, `loss` and, if it has one, `flops`.

    count: `non-embedding` takes the column `non_embedding_parameters` for N. Lines without a loss are members of a sweep that
    failed, and left out. Raises DegenerateError with file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream))
    except UnicodeDecodeError:
        raise DegenerateError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise DegenerateError(f"{path}: cannot be read: {error.strerror}") from None
    rows = [row for row in rows if not (row and row[0].startswith("#"))]
    if not rows:
        raise DegenerateError(f"{path}: is empty; it needs the columns parameters, tokens, loss")
    header = [name.strip().lower() for name in rows[0]]
    places = {name: _column(path, header, name, count) for name in _COLUMNS}
    places["flops"] = header.index("flops") if "flops" in header else None
    points = []
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row) or _cell(row, places["loss"]) == "":
            continue
        points.append(_point(path, line, row, places))
    return Points(tuple(points))


def _column(path: Path, header: Sequence[str], name: str, count: str) -> int | None:
    names = _COLUMNS[name]
    if name == "parameters" and count == "non-embedding":
        names = ("non_embedding_parameters",)
    for one in names:
        if one in header:
            return header.index(one)
    raise DegenerateError(f"{path}: has no column {names[0]!r}{nearest(names[0], list(header))}")


def _cell(row: Sequence[str], place: int | None) -> str:
    return "" if place is None or place >= len(row) else row[place].strip()


def _point(path: Path, line: int, row: Sequence[str], places: dict[str, int | None]) -> Point:
    values: dict[str, float] = {}
    for name, place in places.items():
        text = _cell(row, place)
        if text == "" and name == "flops":
            continue
        try:
            values[name] = float(text.replace("_", ""))
        except ValueError:
            raise DegenerateError(f"{path}:{line}: {name} is {text!r}, not a number") from None
    point = Point(**values)
    if (problem := point.problem()) is not None:
        raise DegenerateError(f"{path}:{line}: {problem}")
    return point


@dataclass(frozen=True)
class ParametricLaw:
    """The five numbers of the law.

    E is the loss that no model of the kind goes below, A/N^α the price of a finite model, B/D^β that of finite data. L has the
    unit of the points that it was fitted to, and N is counted as theirs.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, parameters: Vector | float, tokens: Vector | float) -> Vector:
        """L at N and D."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    @property
    def parameters_exponent(self) -> float:
        """a of N ∝ C^a along the compute-optimal models: β / (α + β)."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss at C = 6 N D (Hoffmann et al. 2022, eq. 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / FLOPS_PER_PARAMETER_TOKEN) ** self.parameters_exponent
        return parameters, flops / FLOPS_PER_PARAMETER_TOKEN / parameters

    def numbers(self) -> tuple[float, float, float, float, float]:
        """(E, A, B, α, β)."""
        return astuple(self)


#: Hoffmann et al. 2022, approach 3, as printed: rounded, from an optimizer that stopped early, and so not to be relied on.
HOFFMANN = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)
#: Besiroglu et al. 2024 (2404.10102), the same form on 240 of the points of Hoffmann et al.'s figure 4. All parameters counted;
#: nats a token of MassiveText with Chinchilla's tokenizer.
BESIROGLU = ParametricLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


@dataclass(frozen=True)
class DataConstrainedLaw:
    """L = E + A/N'^α + B/D'^β, in which N' and D' are what N parameters and D tokens are worth on U_D unique tokens.

    The first R* repetitions are worth nearly as much as new tokens, later ones ever less; parameters beyond the U_N that are
    optimal for U_D decay likewise. The defaults are the paper's fit (its appendix A) on C4, in nats a token.
    """

    E: float = 1.87
    A: float = 521.0
    B: float = 1488.0
    alpha: float = 0.353
    beta: float = 0.353
    #: R*: repetitions after which a further one is worth 1/e of a new one, of tokens and of excess parameters.
    repeated_tokens: float = 15.4
    repeated_parameters: float = 5.3
    #: U_N over U_D.
    optimal_parameters_per_token: float = 0.051

    def predict(self, parameters: Vector | float, tokens: Vector | float, unique_tokens: Vector | float) -> Vector:
        """L of N parameters on D tokens, `unique_tokens` of them different. Raises ValueError when those are more than D."""
        n, d, unique_d = (np.asarray(value, dtype=float) for value in (parameters, tokens, unique_tokens))
        if np.any(unique_d > d):
            raise ValueError("more unique tokens than tokens")
        unique_n = np.minimum(self.optimal_parameters_per_token * unique_d, n)
        worth_n = _worth(n, unique_n, self.repeated_parameters)
        worth_d = _worth(d, unique_d, self.repeated_tokens)
        return np.asarray(self.E + self.A * worth_n**-self.alpha + self.B * worth_d**-self.beta)


def _worth(total: Vector, unique: Vector, decay: float) -> Vector:
    """U + U R* (1 − e^(−R / R*)) for R = total / U − 1 repetitions: what `total` is worth when only `unique` is new (eq. 5)."""
    repetitions = np.maximum(total / unique - 1, 0)
    return np.asarray(unique + unique * decay * (1 - np.exp(-repetitions / decay)))


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
