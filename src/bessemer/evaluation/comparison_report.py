"""Comparison of evaluations as report data: a table with intervals and verdicts, a leaderboard, flipped items."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bessemer.core.report import Cell, Column, Heading, Part, Table, Text
from bessemer.core.statistics import Estimate, score
from bessemer.evaluation.comparison import LEVEL, UNDECIDED, Comparison, Flip, Leaderboard, verdict

_DIFFERENCES = (-1.0, 1.0)
#: Of a prompt, whose examples come first: the question stands at its end.
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
        found = _verdict(verdict(overall, overall.p_value))
        means = (_mean([task.first for task in comparison.tasks]), _mean([task.second for task in comparison.tasks]))
        rows.append(["mean of tasks", f"{overall.items:,}", *means, difference(overall), p_value(overall.p_value), "", found])
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
        beside: list[str | Cell] = ["", "", ""]
        if standing.from_first is not None:
            found = _verdict(verdict(standing.from_first, standing.adjusted_p))
            beside = [difference(standing.from_first), p_value(standing.adjusted_p), found]
        means = [f"{one.mean:.3f}" for one in standing.tasks.values()]
        rows.append([str(place), Cell(standing.name, strong=place == 1), score(standing.mean), *beside, *means])
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
    return f"{math.fsum(one.mean for one in estimates) / len(estimates):.3f}"


def _verdict(text: str) -> Cell:
    return Cell(text, strong=text != UNDECIDED)
