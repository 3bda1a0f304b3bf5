"""`bessemer data`: what somebody's rows are, before a model learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Runs

_EXAMPLE = "Example: bessemer data preview chats.jsonl --model smollm2 --rows 2,7"

data = typer.Typer(help="Look at data before a model learns from it.", no_args_is_help=True, epilog=_EXAMPLE)


@data.callback()
def _group() -> None:
    """A group, though it has one command."""


@data.command("preview", epilog=_EXAMPLE)
def preview(
    place: Annotated[Path, typer.Argument(metavar="DATA", help="A table or a file of conversations.")],
    model: Annotated[str, typer.Option(help="The model that would be trained.")],
    rows: Annotated[str, typer.Option(help="--model: which rows to show, from 1, separated by commas.")] = "1",
    context_length: Annotated[int | None, typer.Option(help="--model: tokens of a row; the model's context.", min=8)] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions; found by its name.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answers; found by its name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="--model: print everything as JSON.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Show the tokens of rows as a model is trained on them: what is learnt in colour, and where the turns end.

    Counts all rows of the file. The exit code is 2 where training would refuse it: nothing is learnt, or the model's chat
    template cannot write the rows.
    """
    from bessemer.cli.data_preview import print_masks
    from bessemer.posttraining.data.examples import read_conversations
    from bessemer.posttraining.sft.finetune_inputs import find_columns

    conversations = read_conversations(place, find_columns(place, prompt_column, answer_column))
    print_masks(conversations, model, rows, runs, context_length=context_length, as_json=as_json)
