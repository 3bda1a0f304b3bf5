"""`bessemer data preview`: what a model would learn of a file, token by token, before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from bessemer.posttraining.data.examples import Conversation
    from bessemer.tokenization.tokenizer import Tokenizer

data = typer.Typer(
    no_args_is_help=True,
    help="Look at what is learnt from, before a run.",
    epilog="Example: bessemer data preview tickets.csv --model smollm2",
)


@data.callback()
def _group() -> None:
    """A group, though it has one command."""


@data.command(epilog="Example: bessemer data preview chats.jsonl --model Qwen/Qwen3-0.6B --rows 2,7")
def preview(
    file: Annotated[Path, typer.Argument(help="Rows for fine-tuning: conversations, or questions and answers.")],
    model: Annotated[str, typer.Option(help="The model that would be trained.")],
    rows: Annotated[str, typer.Option(help="Which rows to show, from 1: 1, or 1,5,9.")] = "1",
    context_length: Annotated[int | None, typer.Option(help="Tokens of a row; the model's context.", min=8)] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions; found by its name.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answers; found by its name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Show the tokens of rows as a model is trained on them: what is learnt in colour, and where the turns end.

    Counts all rows of the file, and refuses it as a run would: where nothing is learnt, or the model's chat template cannot
    write the rows.
    """
    from bessemer.posttraining.data.mask import preview_masks

    conversations = _conversations(file, prompt_column, answer_column)
    shown = _numbers(rows, len(conversations))
    tokenizer, longest = _model(model, runs)
    found = preview_masks(conversations, tokenizer, shown, context_length or longest)
    if as_json:
        print(json.dumps(found.figures, ensure_ascii=False, indent=2))
        return
    from bessemer.views.masks import show_masks

    print_view(show_masks(found), soft_wrap=True)


def _conversations(file: Path, prompt_column: str | None, answer_column: str | None) -> list[Conversation]:
    from bessemer.posttraining.data.examples import read_conversations
    from bessemer.posttraining.sft.finetune_inputs import find_columns

    return read_conversations(file, find_columns(file, prompt_column, answer_column))


def _numbers(rows: str, count: int) -> list[int]:
    """The numbers of `--rows`, counted from 0. Raises ConfigError."""
    from bessemer.core.errors import ConfigError

    numbers = [part.strip() for part in rows.split(",")]
    if not all(number.isdecimal() and 1 <= int(number) <= count for number in numbers):
        raise ConfigError(f"--rows {rows}: numbers from 1 to {count:,}, separated by commas")
    return [int(number) - 1 for number in numbers]


def _model(model: str, runs: Path) -> tuple[Tokenizer, int]:
    """The tokenizer and the context of a model, without its weights."""
    from tempfile import TemporaryDirectory

    from bessemer.cli.finetune import model_source
    from bessemer.posttraining.sft.finetune_inputs import read_base

    with TemporaryDirectory() as scratch:
        base = read_base(model_source(model, runs), Path(scratch))
        # reads its files while they are there
        _ = base.tokenizer.chat_template is not None and base.tokenizer.marks_generation
        return base.tokenizer, base.config.max_position_embeddings
