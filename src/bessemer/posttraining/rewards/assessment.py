"""How good a reward model is on pairs that it has not seen: accuracy, calibration, and what it makes of length.

Numbers and parts of a report; no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bessemer.core.records import json_lines
from bessemer.core.report import Cell, Column, Curves, Heading, Part, Series, Table, Text
from bessemer.core.statistics import (
    BINS,
    Estimate,
    Reliability,
    mean_estimate,
    reliability,
    reliability_curves,
    reliability_table,
    score,
)
from bessemer.core.store import write_text

#: The scored pairs in the stage's folder.
HELD_OUT = "held_out.jsonl"
#: Number of equally large groups of pairs, or answers, in the plots by length.
_GROUPS = 8
#: Fewest pairs of a bin of the reliability plot.
_PAIRS_OF_A_BIN = 10
#: Fewest pairs for a plot.
_FEW_PAIRS = 40


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair's rewards, the lengths of its answers in tokens, and its prompt's hash: pairs of one prompt are no
    independent evidence."""

    prompt: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def is_right(self) -> bool:
        """Whether the chosen answer has the higher reward; equal rewards are wrong."""
        return self.chosen > self.rejected

    @property
    def probability(self) -> float:
        """σ(Δ), with which the model takes the chosen answer to be better."""
        return 1 / (1 + math.exp(-min(max(self.chosen - self.rejected, -700.0), 700.0)))


def accuracy(pairs: Sequence[ScoredPair]) -> Estimate:
    """Share of pairs whose chosen answer has the higher reward, clustered by prompt."""
    return mean_estimate([pair.is_right for pair in pairs], [pair.prompt for pair in pairs])


def longer_is_chosen(pairs: Sequence[ScoredPair]) -> float:
    """Accuracy of taking the longer answer, where equal lengths are right half of the time: what a model must beat."""
    return float(np.mean([0.5 + 0.5 * np.sign(pair.chosen_tokens - pair.rejected_tokens) for pair in pairs]))


def calibration(pairs: Sequence[ScoredPair]) -> Reliability:
    """Reliability of σ(Δ) as the probability of the answer that the model prefers."""
    return reliability(
        [max(pair.probability, 1 - pair.probability) for pair in pairs],
        [pair.is_right for pair in pairs],
        bins=min(BINS, max(1, len(pairs) // _PAIRS_OF_A_BIN)),
        clusters_N=[pair.prompt for pair in pairs],
    )


def rank_correlation(first_N: ArrayLike, second_N: ArrayLike) -> float:
    """Spearman's correlation of ranks, equal values having their mean rank; NaN where one side is all equal."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first_N, second_N)]
    centred = [values - values.mean() for values in ranks]
    scale = math.sqrt(float(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float(centred[0] @ centred[1]) / scale if scale else math.nan


def _ranks(values_N: np.ndarray) -> np.ndarray:
    _, of_equal, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[of_equal]


def assess(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The headline figures of held-out pairs; undefined ones are left out."""
    if not pairs:
        return {}
    score = accuracy(pairs)
    low, high = score.interval(bounds=(0.0, 1.0))
    rewards, lengths = _answers(pairs)
    correlation = rank_correlation(rewards, lengths)
    return {
        "held_out_accuracy": round(score.mean, 4),
        "held_out_accuracy_low": round(low, 4),
        "held_out_accuracy_high": round(high, 4),
        "longer_is_chosen": round(longer_is_chosen(pairs), 4),
        "calibration_error": round(calibration(pairs).expected_calibration_error, 4),
        **({} if math.isnan(correlation) else {"length_correlation": round(correlation, 4)}),
    }


def write_scored_pairs(path: Path, pairs: Iterable[ScoredPair]) -> None:
    """Write pairs as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))


def read_scored_pairs(path: Path) -> list[ScoredPair]:
    """The pairs of a file; none where there is no file."""
    if not path.exists():
        return []
    return [ScoredPair(**row) for row in json_lines(path.read_text(encoding="utf-8"))]


def assessment_parts(pairs: Sequence[ScoredPair]) -> list[Part]:
    """Accuracy by length, reliability, and the plots of both; nothing without pairs."""
    if not pairs:
        return []
    parts: list[Part] = [
        Heading("Pairs held out"),
        _length_table(pairs),
        Text(
            f"Always taking the longer answer would be right in {longer_is_chosen(pairs):.1%} of them. A model that leans on "
            "length is right where the chosen answer is the longer one, and wrong where it is the shorter."
        ),
    ]
    if len(pairs) >= _FEW_PAIRS:
        curve = calibration(pairs)
        parts += [
            _accuracy_by_length(pairs),
            _reward_by_length(pairs),
            reliability_curves({f"σ(Δ), expected calibration error {curve.expected_calibration_error:.3f}": curve}),
            Heading("Is it as often right as σ(Δ) says?", level=4),
            reliability_table(curve),
        ]
    return parts


def _answers(pairs: Sequence[ScoredPair]) -> tuple[np.ndarray, np.ndarray]:
    """(rewards, lengths) of all answers."""
    rewards = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    return np.array(rewards), np.array([*(pair.chosen_tokens for pair in pairs), *(pair.rejected_tokens for pair in pairs)])


def _length_table(pairs: Sequence[ScoredPair]) -> Table:
    groups: list[tuple[str, Callable[[ScoredPair], bool]]] = [
        ("all", lambda pair: True),
        ("chosen is longer", lambda pair: pair.chosen_tokens > pair.rejected_tokens),
        ("equally long", lambda pair: pair.chosen_tokens == pair.rejected_tokens),
        ("chosen is shorter", lambda pair: pair.chosen_tokens < pair.rejected_tokens),
    ]
    rows: list[list[str | Cell]] = []
    for name, belongs in groups:
        inside = [pair for pair in pairs if belongs(pair)]
        if inside:
            rows.append([name, f"{len(inside):,}", score(accuracy(inside))])
    return Table([Column("Pairs"), Column("Number", True), Column("Accuracy", True)], rows)


def _accuracy_by_length(pairs: Sequence[ScoredPair]) -> Curves:
    differences = np.array([pair.chosen_tokens - pair.rejected_tokens for pair in pairs])
    x, y = _grouped(differences, np.array([pair.is_right for pair in pairs], np.float64))
    return Curves(
        [Series("reward model", x, y)],
        "Accuracy by how much longer the chosen answer is",
        x_label="tokens longer",
        wide=False,
        from_zero=True,
    )


def _reward_by_length(pairs: Sequence[ScoredPair]) -> Curves:
    rewards, lengths = _answers(pairs)
    x, y = _grouped(lengths, rewards)
    correlation = rank_correlation(rewards, lengths)
    return Curves([Series(f"rank correlation {correlation:+.2f}", x, y)], "Reward by length", x_label="tokens", wide=False)


def _grouped(by: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean of `by`, mean of the values) of groups of about equally many, in the order of `by`; equal ones stay together."""
    _, of_equal, counts = np.unique(by, return_inverse=True, return_counts=True)
    group_of_equal = ((np.cumsum(counts) - counts / 2) * _GROUPS / len(by)).astype(int)
    group = group_of_equal[of_equal]
    inside = [group == number for number in np.unique(group)]
    return [float(by[one].mean()) for one in inside], [float(values[one].mean()) for one in inside]
