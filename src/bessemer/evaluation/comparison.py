"""Comparison of evaluations on the items that they have in common: task by task, and several as a leaderboard."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.statistics import Estimate, holm, mean_estimate, mean_of_estimates, paired_difference
from bessemer.evaluation.evaluation_folder import Evaluation, read_texts

#: A difference counts when its p value, corrected for the number of tests, is at most this.
LEVEL = 0.05

BETTER, WORSE, UNDECIDED = "better", "worse", "unclear"


def verdict(difference: Estimate, adjusted_p: float) -> str:
    """`better` or `worse` where the corrected p value is at most 0.05, else `unclear`."""
    if adjusted_p > LEVEL:
        return UNDECIDED
    return BETTER if difference.mean > 0 else WORSE


@dataclass(frozen=True)
class TaskComparison:
    """Two evaluations on the items of a task that both have. difference: second − first, paired.

    unmatched: items that only one of the two has. adjusted_p: Holm's, over the tasks that are compared.
    """

    task: str
    first: Estimate
    second: Estimate
    difference: Estimate
    adjusted_p: float
    unmatched: int

    @property
    def verdict(self) -> str:
        """Of the second beside the first."""
        return verdict(self.difference, self.adjusted_p)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations. overall: the plain mean of the tasks' differences. one_sided: tasks that one of the two has alone."""

    names: tuple[str, str]
    tasks: list[TaskComparison]
    overall: Estimate
    one_sided: list[str]


@dataclass(frozen=True)
class Standing:
    """An evaluation's place in a leaderboard.

    mean: the plain mean of its tasks. from_first: this mean minus the first's, paired; None of the first itself. adjusted_p:
    Holm's, over the evaluations behind the first.
    """

    name: str
    mean: Estimate
    tasks: dict[str, Estimate]
    from_first: Estimate | None
    adjusted_p: float


@dataclass(frozen=True)
class Leaderboard:
    """Evaluations on the items that all have, the best first. left_out: tasks that some do not have."""

    standings: list[Standing]
    items: dict[str, int]
    left_out: list[str]


class Flip(NamedTuple):
    """An item that one model gets right and the other wrong, with the second's prompt and both answers."""

    task: str
    item: str
    gained: bool
    prompt: str
    answers: tuple[str, str]


class _Matched(NamedTuple):
    """Scores of E evaluations on the N items of a task that all have: scores_EN, and the cluster of each item."""

    items: list[str]
    scores_EN: np.ndarray
    clusters: list[Hashable]


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """The second beside the first, task by task. Raises ArtefactError when they have no item in common."""
    matched = _matched([first, second])
    differences = [paired_difference(one.scores_EN[1], one.scores_EN[0], one.clusters) for one in matched.values()]
    adjusted = holm([difference.p_value for difference in differences])
    tasks = [
        TaskComparison(
            task,
            mean_estimate(one.scores_EN[0], one.clusters),
            mean_estimate(one.scores_EN[1], one.clusters),
            difference,
            float(p_value),
            len(first.tasks[task].keys() ^ second.tasks[task].keys()),
        )
        for (task, one), difference, p_value in zip(matched.items(), differences, adjusted, strict=True)
    ]
    return Comparison((first.name, second.name), tasks, mean_of_estimates(differences), _left_out([first, second], matched))


def leaderboard(evaluations: Sequence[Evaluation]) -> Leaderboard:
    """Several evaluations by the mean of the tasks that all have. Raises ArtefactError when they have no item in common."""
    matched = _matched(evaluations)
    by_task = [
        {task: mean_estimate(one.scores_EN[index], one.clusters) for task, one in matched.items()}
        for index in range(len(evaluations))
    ]
    means = [mean_of_estimates(list(tasks.values())) for tasks in by_task]
    best, *others = sorted(range(len(evaluations)), key=lambda index: -means[index].mean)
    from_first = [
        mean_of_estimates(
            [paired_difference(one.scores_EN[index], one.scores_EN[best], one.clusters) for one in matched.values()]
        )
        for index in others
    ]
    adjusted = holm([difference.p_value for difference in from_first])
    standings = [Standing(evaluations[best].name, means[best], by_task[best], None, 1.0)] + [
        Standing(evaluations[index].name, means[index], by_task[index], difference, float(p_value))
        for index, difference, p_value in zip(others, from_first, adjusted, strict=True)
    ]
    items = {task: len(one.items) for task, one in matched.items()}
    return Leaderboard(standings, items, _left_out(evaluations, matched))


def flips(first: Evaluation, second: Evaluation) -> list[Flip]:
    """Items that are right (a score of at least one half) in one evaluation and wrong in the other, in the order of the first.

    Raises ArtefactError when the two have no item in common.
    """
    flipped: dict[tuple[str, str], bool] = {}
    for task, one in _matched([first, second]).items():
        right_EN = one.scores_EN >= 0.5
        for index in np.flatnonzero(right_EN[0] != right_EN[1]).tolist():
            flipped[task, one.items[index]] = bool(right_EN[1, index])
    before, after = (read_texts(evaluation, flipped.keys()) for evaluation in (first, second))
    return [
        Flip(task, item, gained, after[task, item].prompt, (before[task, item].answer, after[task, item].answer))
        for (task, item), gained in flipped.items()
    ]


def _matched(evaluations: Sequence[Evaluation]) -> dict[str, _Matched]:
    """By task, in the first's order. An item's cluster is the one that the first evaluation which names one gives it."""
    found = {}
    for task, items in evaluations[0].tasks.items():
        scores = [evaluation.tasks.get(task, {}) for evaluation in evaluations]
        common = [item for item in items if all(item in of_one for of_one in scores)]
        if common:
            scores_EN = np.array([[of_one[item].score for item in common] for of_one in scores])
            clusters: list[Hashable] = []
            for item in common:
                named = next((of_one[item].cluster for of_one in scores if of_one[item].cluster is not None), None)
                # a tuple, so that no name of a cluster is an item's
                clusters.append((item,) if named is None else named)
            found[task] = _Matched(common, scores_EN, clusters)
    if not found:
        folders = ", ".join(str(evaluation.folder) for evaluation in evaluations)
        raise ArtefactError(f"{folders}: these evaluations have no item of a task in common")
    return found


def _left_out(evaluations: Sequence[Evaluation], matched: dict[str, _Matched]) -> list[str]:
    return sorted({task for evaluation in evaluations for task in evaluation.tasks} - matched.keys())
