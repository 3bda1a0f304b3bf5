"""Comparison of evaluations on the items that they have in common: task by task, several as a leaderboard, and as report data.

Differences are paired: an item's difficulty cancels. Intervals are clustered, and p values corrected by Holm.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.report import Cell, Column, Heading, Part, Table, Text
from bessemer.core.statistics import Estimate, holm, mean_estimate, mean_of_estimates, paired_difference, score
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
        """Of the second, compared with the first."""
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
    """Compare the second with the first, task by task. Raises ArtefactError when they have no item in common."""
    matched = _matched([first, second])
    differences = [paired_difference(common.scores_EN[1], common.scores_EN[0], common.clusters) for common in matched.values()]
    adjusted = holm([difference.p_value for difference in differences])
    tasks = [
        TaskComparison(
            task,
            mean_estimate(common.scores_EN[0], common.clusters),
            mean_estimate(common.scores_EN[1], common.clusters),
            difference,
            float(p_value),
            len(first.tasks[task].keys() ^ second.tasks[task].keys()),
        )
        for (task, common), difference, p_value in zip(matched.items(), differences, adjusted, strict=True)
    ]
    return Comparison((first.name, second.name), tasks, mean_of_estimates(differences), _left_out([first, second], matched))


def leaderboard(evaluations: Sequence[Evaluation]) -> Leaderboard:
    """Several evaluations by the mean of the tasks that all have. Raises ArtefactError when they have no item in common."""
    matched = _matched(evaluations)
    by_task = [
        {task: mean_estimate(common.scores_EN[index], common.clusters) for task, common in matched.items()}
        for index in range(len(evaluations))
    ]
    means = [mean_of_estimates(list(tasks.values())) for tasks in by_task]
    best, *others = sorted(range(len(evaluations)), key=lambda index: -means[index].mean)
    from_first = [
        mean_of_estimates(
            [paired_difference(common.scores_EN[index], common.scores_EN[best], common.clusters) for common in matched.values()]
        )
        for index in others
    ]
    adjusted = holm([difference.p_value for difference in from_first])
    standings = [Standing(evaluations[best].name, means[best], by_task[best], None, 1.0)] + [
        Standing(evaluations[index].name, means[index], by_task[index], difference, float(p_value))
        for index, difference, p_value in zip(others, from_first, adjusted, strict=True)
    ]
    items = {task: len(common.items) for task, common in matched.items()}
    return Leaderboard(standings, items, _left_out(evaluations, matched))


def flips(first: Evaluation, second: Evaluation) -> list[Flip]:
    """Items that are right (a score of at least one half) in one evaluation and wrong in the other, in the order of the first.

    Raises ArtefactError when the two have no item in common.
    """
    flipped: dict[tuple[str, str], bool] = {}
    for task, common in _matched([first, second]).items():
        right_EN = common.scores_EN >= 0.5
        for index in np.flatnonzero(right_EN[0] != right_EN[1]).tolist():
            flipped[task, common.items[index]] = bool(right_EN[1, index])
    before, after = (read_texts(evaluation, flipped.keys()) for evaluation in (first, second))
    return [
        Flip(task, item, gained, after[task, item].prompt, (before[task, item].answer, after[task, item].answer))
        for (task, item), gained in flipped.items()
    ]


def _matched(evaluations: Sequence[Evaluation]) -> dict[str, _Matched]:
    """Scores by task, in the first's order. The first evaluation that names an item's cluster decides it."""
    matched = {}
    for task, items in evaluations[0].tasks.items():
        scores = [evaluation.tasks.get(task, {}) for evaluation in evaluations]
        common = [item for item in items if all(item in of_one for of_one in scores)]
        if common:
            scores_EN = np.array([[of_one[item].score for item in common] for of_one in scores])
            clusters: list[Hashable] = []
            for item in common:
                named = next((of_one[item].cluster for of_one in scores if of_one[item].cluster is not None), None)
                # a tuple, which equals no name of a cluster
                clusters.append((item,) if named is None else named)
            matched[task] = _Matched(common, scores_EN, clusters)
    if not matched:
        folders = ", ".join(str(evaluation.folder) for evaluation in evaluations)
        raise ArtefactError(f"{folders}: these evaluations have no item of a task in common")
    return matched


def _left_out(evaluations: Sequence[Evaluation], matched: dict[str, _Matched]) -> list[str]:
    return sorted({task for evaluation in evaluations for task in evaluation.tasks} - matched.keys())


_DIFFERENCES = (-1.0, 1.0)
#: Characters of a prompt that are shown, from its end: the question follows the examples.
_PROMPT_CHARACTERS = 1_000


def comparison_parts(comparison: Comparison) -> list[Part]:
    """Both means, the paired difference with its p value and verdict, by task; what is not compared."""
    first, second = comparison.names
    rows: list[list[str | Cell]] = [
        [
            task.task,
            Cell(f"{task.difference.items:,}", remark=f"{task.unmatched:,} unmatched" if task.unmatched else ""),
            score(task.first),
            score(task.second),
            difference(task.difference),
            p_value(task.difference.p_value),
            p_value(task.adjusted_p),
            _verdict(task.verdict),
        ]
        for task in comparison.tasks
    ]
    if len(comparison.tasks) > 1:
        overall = comparison.overall
        verdict_cell = _verdict(verdict(overall, overall.p_value))
        means = (_mean([task.first for task in comparison.tasks]), _mean([task.second for task in comparison.tasks]))
        rows.append(
            ["mean of tasks", f"{overall.items:,}", *means, difference(overall), p_value(overall.p_value), "", verdict_cell]
        )
    headings = ["Items", first, second, "Difference", "p", "p, Holm"]
    columns = [Column("Task"), *(Column(heading, True) for heading in headings), Column(f"{second} is")]
    parts: list[Part] = [Heading(f"{second} beside {first}"), Table(columns, rows), Text(_legend(comparison))]
    if comparison.one_sided:
        parts.append(Text(f"Not compared, since one of the two has no such items: {', '.join(comparison.one_sided)}."))
    return parts


def _legend(comparison: Comparison) -> str:
    clustered = any(task.difference.clusters < task.difference.items for task in comparison.tasks)
    return (
        "In brackets: 95 % intervals, by Student's t"
        + (", items that share a passage taken together" if clustered else "")
        + f". The difference is paired, item by item. A task is better or worse where Holm's p is at most {LEVEL}, else unclear"
        + (", the mean of tasks, one test by itself, where p is." if len(comparison.tasks) > 1 else ".")
    )


def leaderboard_parts(board: Leaderboard) -> list[Part]:
    """Evaluations, the best first, with the paired difference of each from the first."""
    rows: list[list[str | Cell]] = []
    for place, standing in enumerate(board.standings, start=1):
        comparison: list[str | Cell] = ["", "", ""]
        if standing.from_first is not None:
            verdict_cell = _verdict(verdict(standing.from_first, standing.adjusted_p))
            comparison = [difference(standing.from_first), p_value(standing.adjusted_p), verdict_cell]
        means = [f"{estimate.mean:.3f}" for estimate in standing.tasks.values()]
        rows.append([str(place), Cell(standing.name, strong=place == 1), score(standing.mean), *comparison, *means])
    columns = [
        Column("", True),
        Column("Evaluation"),
        Column("Mean of tasks", True),
        Column("Difference from the first", True),
        Column("p, Holm", True),
        Column("Beside the first"),
        *(Column(f"{task} ({count:,})", True) for task, count in board.items.items()),
    ]
    parts: list[Part] = [Heading("Leaderboard"), Table(columns, rows)]
    parts.append(
        Text("Over the items that all have, their number behind each task; in brackets 95 % intervals. Differences are paired.")
    )
    if board.left_out:
        parts.append(Text(f"Left out, since some have no such items: {', '.join(board.left_out)}."))
    return parts


def flip_parts(flips: Sequence[Flip], names: tuple[str, str]) -> list[Part]:
    """The items that flipped, task by task: the prompt, and both answers."""
    if not flips:
        return [Text("No item flipped.")]
    parts: list[Part] = []
    for task in dict.fromkeys(flip.task for flip in flips):
        of_task = [flip for flip in flips if flip.task == task]
        gained = sum(flip.gained for flip in of_task)
        parts.append(Heading(f"{task}: {gained:,} became right, {len(of_task) - gained:,} wrong"))
        parts += [_flip(flip, names) for flip in of_task]
    return parts


def _flip(flip: Flip, names: tuple[str, str]) -> Table:
    prompt = flip.prompt if len(flip.prompt) <= _PROMPT_CHARACTERS else f"…{flip.prompt[-_PROMPT_CHARACTERS:]}"
    rows: list[list[str | Cell]] = [["prompt", prompt.strip()]]
    for name, answer, right in zip(names, flip.answers, (not flip.gained, flip.gained), strict=True):
        rows.append([name, Cell(answer.strip(), strong=right, remark="right" if right else "wrong")])
    return Table([Column("item"), Column(flip.item)], rows)


def difference(estimate: Estimate) -> str:
    """A difference with its 95 % interval: `+0.021 [-0.004, +0.046]`."""
    low, high = estimate.interval(bounds=_DIFFERENCES)
    return f"{estimate.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def p_value(value: float) -> str:
    """A p value in two figures, `< 0.0001` below that."""
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _mean(estimates: Sequence[Estimate]) -> str:
    return f"{math.fsum(estimate.mean for estimate in estimates) / len(estimates):.3f}"


def _verdict(text: str) -> Cell:
    return Cell(text, strong=text != UNDECIDED)
