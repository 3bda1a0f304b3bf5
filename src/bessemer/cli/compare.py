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
            help="Two runs by name or folder; folders of evaluations, two or more; one or two folders that finetune wrote; "
            "with --replay models, the first of them the reference.",
        ),
    ],
    items: Annotated[
        bool, typer.Option("--items", help="Two evaluations: list the items that flipped, with both answers.")
    ] = False,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="Answer the same prompts greedily with forms of one model (a folder, an export, a GGUF, BASE.gguf+LORA.gguf), "
            "in our engine, transformers and llama.cpp, and list where answers differ.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="--replay: a file of rows with prompt or messages (default: ten prompts of our own).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="--replay: most tokens of an answer.", min=1)] = 48,
    tolerance: Annotated[
        float, typer.Option(help="--replay: the gap of two tokens' logits above which a difference is a defect.", min=0.0)
    ] = 0.1,
    activation_bits: Annotated[
        int | None,
        typer.Option(
            help="--replay: bits of the activations beside quantised weights in our engine: 16 (default), or 8 as served."
        ),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Compare two runs or two evaluations, rank several evaluations, or a fine-tuning with what was before or with another.

    Of runs: the settings that differ, then the figures. Of evaluations: means with intervals, and which differences are noise.
    Of fine-tunings: the losses of the conversations that both held out. With --replay: whether forms of one model give the same
    answers in several engines; exit code 1 where one does not.
    """
    from bessemer.core.errors import ConfigError

    if replay:
        if items:
            raise ConfigError("--items: of two evaluations; --replay compares models")
        _replay(things, prompts, max_tokens, tolerance, activation_bits, runs)
        return
    for option, value in (("--prompts", prompts), ("--activation-bits", activation_bits)):
        if value is not None:
            raise ConfigError(f"{option}: of --replay")
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


def _replay(
    names: list[str], prompts: Path | None, max_tokens: int, tolerance: float, activation_bits: int | None, runs: Path
) -> None:
    """The same prompts answered by forms of one model; exit code 1 for a defect."""
    from bessemer.cli.named import find_served
    from bessemer.core.errors import ConfigError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.evaluation.replay import find_thing, read_prompts, replay, replay_lines

    if activation_bits not in (None, 8, 16):
        raise ConfigError(f"--activation-bits {activation_bits}: 8 or 16")
    things = [find_thing(name, lambda name: find_served(name, runs)) for name in names]
    conversations = read_prompts(prompts)
    notes: list[str] = []
    comparisons = replay(
        things,
        conversations,
        max_tokens=max_tokens,
        progress=progress_for_terminal(),
        notes=notes,
        activation_bits=8 if activation_bits == 8 else 16,
    )
    for line in replay_lines(comparisons, tolerance, notes):
        print(line)
    if any(one.defects(tolerance) for one in comparisons):
        raise typer.Exit(1)


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
