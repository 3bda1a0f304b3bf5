"""`bessemer data`: what somebody's rows are, before a model learns from them."""

from __future__ import annotations

from typing import Annotated

import typer

data = typer.Typer(help="Look at data before a model learns from it.", no_args_is_help=True)


@data.command("preview")
def preview(
    place: Annotated[str, typer.Argument(metavar="DATA", help="A table, a folder, or hub:ORGANISATION/NAME#SPLIT.")],
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions; found by its name.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answers; found by its name.")] = None,
    on_bad_row: Annotated[
        str, typer.Option(help="Rows that cannot be used. skip: shown, at most a twentieth; stop: an error.")
    ] = "skip",
) -> None:
    """Say what was understood of a file: its form, the roles of its columns, its rows, bad rows, two examples.

    The exit code is 2 where training would refuse the file.
    """
    from bessemer.cli.named import option_of
    from bessemer.posttraining.data.examples import previewed
    from bessemer.posttraining.sft.config import FinetuneConfig

    given = {"prompt_column": prompt_column, "answer_column": answer_column, "on_bad_row": on_bad_row}
    config = FinetuneConfig.parse(
        {name: value for name, value in given.items() if value is not None}, option_of("data preview")
    )
    understood = previewed(place, config.prompt_column, config.answer_column)
    for line in understood.lines():
        print(line)
    understood.checked(config.on_bad_row)
