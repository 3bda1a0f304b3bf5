"""`bessemer compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from bessemer.core.report import Part


def compare(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two runs by name or folder; folders of evaluations, two or more; one or two folders that finetune wrote.",
        ),
    ],
    items: Annotated[bool, typer.Option("--items", help="Of two evaluations: the items that flipped, both answers.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Compare two runs or two evaluations, rank several evaluations, or a fine-tuning with what was before or with another.

    Of runs: the settings that differ, then the figures. Of evaluations: means with intervals, and which differences are noise.
    Of fine-tunings: the losses of the conversations that both held out.
    """
    from bessemer.core.errors import ConfigError
    from bessemer.evaluation.evaluation_folder import is_evaluation
    from bessemer.model.storage.tuned_folder import is_tuned

    if len(things) <= 2 and all(is_tuned(Path(thing)) for thing in things) and not items:
        _compare_tuned([Path(thing) for thing in things])
        return
    if len(things) < 2:
        raise ConfigError(f"{things[0]} alone: name at least two runs, or folders of evaluations, to compare")
    evaluations = [thing for thing in things if is_evaluation(Path(thing))]
    if items and (len(things) > 2 or not evaluations):
        raise ConfigError("--items: name two folders of evaluations; the items that flipped are theirs")
    if not evaluations:
        if len(things) > 2:
            raise ConfigError(f"{len(things)} runs: two are compared at a time")
        _compare_runs(things[0], things[1], runs)
    elif len(evaluations) < len(things):
        other = next(thing for thing in things if thing not in evaluations)
        raise ConfigError(f"{other}: this is no folder of an evaluation, as {evaluations[0]} is; it has no items.jsonl")
    else:
        _compare_evaluations(things, items=items)


def _compare_evaluations(folders: list[str], *, items: bool) -> None:
    from bessemer.evaluation.comparison import compare as compare_two
    from bessemer.evaluation.comparison import comparison_parts, flip_parts, flips, leaderboard, leaderboard_parts
    from bessemer.evaluation.evaluation_folder import read_evaluation
    from bessemer.views.parts_terminal import show_parts

    evaluations = [read_evaluation(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    parts: list[Part]
    if len(evaluations) > 2:
        parts = leaderboard_parts(leaderboard(evaluations))
    else:
        first, second = evaluations
        parts = comparison_parts(compare_two(first, second))
        if items:
            parts += flip_parts(flips(first, second), (first.name, second.name))
    print_view(*show_parts(parts))


def _compare_tuned(outs: list[Path]) -> None:
    """One fine-tuning with its base, or two."""
    from bessemer.model.storage.tuned_folder import read_record
    from bessemer.posttraining.sft.report import compared_lines, record_lines

    results = [read_record(out)["result"] for out in outs]
    lines = record_lines(results[0]) if len(outs) == 1 else compared_lines(results, _names([str(out) for out in outs]))
    for line in lines:
        print(line)


def _names(folders: list[str]) -> list[str]:
    """The last part of each path, or the whole where two would be the same."""
    short = [Path(folder).resolve().name for folder in folders]
    return [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]


def _compare_runs(first: str, second: str, runs: Path) -> None:
    from bessemer.cli.named import open_run
    from bessemer.pipeline.report import compare_runs
    from bessemer.views.parts_terminal import show_parts

    print_view(*show_parts(compare_runs(open_run(first, runs), open_run(second, runs))))
