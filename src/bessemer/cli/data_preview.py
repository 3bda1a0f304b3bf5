"""The view of `bessemer data preview --model`: what a model would learn of rows, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.cli.options import print_view

if TYPE_CHECKING:
    from bessemer.posttraining.data.examples import Conversation
    from bessemer.tokenization.tokenizer import Tokenizer


def print_masks(
    conversations: Sequence[Conversation],
    model: str,
    rows: str,
    runs: Path,
    *,
    context_length: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the tokens of some rows as a model is trained on them, and the counts of all.

    rows: their numbers from 1, separated by commas. context_length: tokens of a row; None: the model's context. Raises
    ConfigError for numbers that no row has, SourceError for data that a run would refuse.
    """
    from bessemer.posttraining.data.mask import preview_masks

    shown = _numbers(rows, len(conversations))
    tokenizer, longest = _model(model, runs)
    found = preview_masks(conversations, tokenizer, shown, context_length or longest)
    if as_json:
        print(json.dumps(found.figures, ensure_ascii=False, indent=2))
        return
    from bessemer.views.data_terminal import show_masks

    print_view(show_masks(found), soft_wrap=True)


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

    from bessemer.cli.named import model_source
    from bessemer.posttraining.sft.finetune_inputs import read_base

    with TemporaryDirectory() as scratch:
        base = read_base(model_source(model, runs), Path(scratch))
        # reads its files while they are there
        _ = base.tokenizer.chat_template is not None and base.tokenizer.marks_generation
        return base.tokenizer, base.config.max_position_embeddings
