"""`bessemer data`: what somebody's rows are, before a model learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Runs

_EXAMPLE = "Example: bessemer data preview tickets.csv\n\nbessemer data preview chats.jsonl --model smollm2 --rows 2,7"

data = typer.Typer(help="Look at data before a model learns from it.", no_args_is_help=True, epilog=_EXAMPLE)


@data.callback()
def _group() -> None:
    """A group, though it has one command."""


@data.command("preview", epilog=_EXAMPLE)
def preview(
    place: Annotated[str, typer.Argument(metavar="DATA", help="A table, a folder, or hub:ORGANISATION/NAME#SPLIT.")],
    model: Annotated[str | None, typer.Option(help="Also show the tokens that this model would learn.")] = None,
    rows: Annotated[str, typer.Option(help="--model: which rows to show, from 1, separated by commas.")] = "1",
    context_length: Annotated[
        int | None, typer.Option(help="--model: tokens of a row (default: the model's context).", min=8)
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions (default: found by its name).")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answers (default: found by its name).")] = None,
    on_bad_row: Annotated[
        str, typer.Option(help="Rows that cannot be used. skip: shown, at most a twentieth; stop: an error.")
    ] = "skip",
    as_json: Annotated[bool, typer.Option("--json", help="--model: print everything as JSON.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Say what was understood of a file: its form, the roles of its columns, its rows, bad rows, two examples.

    With --model the tokens of rows as that model is trained on them: what is learnt in colour, and where the turns end. The
    exit code is 2 where training would refuse the file: too many bad rows, nothing learnt, or rows that the model's chat
    template cannot write.
    """
    from bessemer.cli.named import option_of
    from bessemer.posttraining.data.examples import RowReader, previewed, read_conversations
    from bessemer.posttraining.data.made import data_name, data_path
    from bessemer.posttraining.sft.config import FinetuneConfig
    from bessemer.posttraining.sft.finetune_inputs import find_columns

    given = {"prompt_column": prompt_column, "answer_column": answer_column, "on_bad_row": on_bad_row}
    config = FinetuneConfig.parse(
        {name: value for name, value in given.items() if value is not None}, option_of("data preview")
    )
    if model is None:
        understood = previewed(place, config.prompt_column, config.answer_column)
        for line in understood.lines():
            print(line)
        understood.checked(config.on_bad_row)
        return
    from bessemer.cli.data_preview import print_masks

    found = data_path(data_name(place), Path(), {})
    columns = find_columns(found, config.prompt_column, config.answer_column)
    reader = RowReader(config.on_bad_row, None if as_json else print)
    print_masks(read_conversations(found, columns, reader), model, rows, runs, context_length=context_length, as_json=as_json)
