"""`bessemer import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file, a tokenizer.json or the folder of one, vocab.json with merges.txt, a SentencePiece .model, or a "
            "tiktoken file."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    split: Annotated[str | None, typer.Option(help="Name of the split regex, for a file that does not hold it.")] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(help="tiktoken: a control token, or TOKEN=ID; may be repeated. Without ids, in order, at the end."),
    ] = None,
) -> None:
    """Read a tokenizer of another tool, every id kept. Of a model's file or folder, the tokenizer alone is read."""
    from bessemer.tokenization.formats import import_tokenizer
    from bessemer.tokenization.tokenizer import load_tokenizer

    kind, notes = import_tokenizer(source, out, split=split, special_tokens=_special_tokens(special or []))
    for note in notes:
        print(f"note: {note}")
    print(f"{out}: a tokenizer of {load_tokenizer(out).vocab_size:,} tokens, read from {kind}")


def _special_tokens(given: list[str]) -> list[str] | dict[str, int]:
    """Tokens in order, or all with their ids. Raises ConfigError for a mixture."""
    from bessemer.core.errors import ConfigError

    parted = [token.rpartition("=") for token in given]
    with_ids = {token: int(id) for token, _, id in parted if token and id.isdigit()}
    if with_ids and len(with_ids) < len(given):
        raise ConfigError("--special: give all tokens an id (TOKEN=ID), or none")
    return with_ids or given
