"""`bessemer import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A model: a GGUF file, a Hugging Face folder, a hub id (ORG/NAME), or smollm2. Or a tokenizer: a GGUF file "
            "without weights, a tokenizer.json or the folder of one, vocab.json with merges.txt, a SentencePiece .model, or a "
            "tiktoken file."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of a model's weights: f32, f16 or bf16. As the source has them; f32 if quantised.")
    ] = None,
    tokenizer_only: Annotated[bool, typer.Option("--tokenizer-only", help="Of a model, read the tokenizer alone.")] = False,
    split: Annotated[str | None, typer.Option(help="Name of the split regex, for a file that does not hold it.")] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(help="tiktoken: a control token, or TOKEN=ID; may be repeated. Without ids, in order, at the end."),
    ] = None,
) -> None:
    """Read a model or a tokenizer of another tool, every token's id kept. No code that comes with it is run."""
    from bessemer.core.errors import ConfigError

    model = None
    if not tokenizer_only:
        from bessemer.model.formats.exchange import find_model

        model = find_model(source)
    if model is None:
        if dtype is not None:
            raise ConfigError("--dtype: of a model's weights, and this is a tokenizer")
        _import_tokenizer(source, out, split, special or [])
        return
    if special:
        raise ConfigError("--special: for a tokenizer in a tiktoken file, and this is a model")
    from bessemer.model.folder_config import read_model_config
    from bessemer.model.formats.exchange import import_model

    for note in import_model(model, out, dtype=dtype, split=split):
        print(f"note: {note}")
    config = read_model_config(out)
    print(f"{out}: a {config.model_type} model of {config.parameters():,} parameters, read from {model.name}")


def _import_tokenizer(source: str, out: Path, split: str | None, special: list[str]) -> None:
    from bessemer.tokenization.formats import import_tokenizer
    from bessemer.tokenization.tokenizer import load_tokenizer

    kind, notes = import_tokenizer(Path(source), out, split=split, special_tokens=_special_tokens(special))
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
