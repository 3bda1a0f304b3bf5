"""`bessemer export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[Path, typer.Argument(help="A tokenizer's folder, or a model's, of which the tokenizer is exported.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[str, typer.Option(help="gguf, sentencepiece or tiktoken.")],
) -> None:
    """Write a tokenizer for another tool; of a model's folder, the tokenizer alone and not the weights."""
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import follow
    from bessemer.tokenization.formats import FORMATS, export_tokenizer

    if format not in FORMATS:
        raise ConfigError(f"--format: there is no {format!r}{nearest(format, list(FORMATS))}; formats: {', '.join(FORMATS)}")
    for note in export_tokenizer(follow(folder), out, format):
        print(f"note: {note}")
    print(f"{out}: written")
