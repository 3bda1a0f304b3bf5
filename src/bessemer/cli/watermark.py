"""`bessemer watermark`: a key file for marking texts, and the test of a text for the mark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Runs

if TYPE_CHECKING:
    from bessemer.inference.sampling.params import WatermarkConfig


def watermark(
    key: Annotated[Path, typer.Argument(help="File of the key and its settings; with --new it is made.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Text files to test; - reads the standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, or its tokenizer: the tokens of a text are tested.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Make the file, with a new secret key.")] = False,
    method: Annotated[
        str,
        typer.Option(help="With --new: gumbel keeps the distribution of texts; green favours tokens, also at temperature 0."),
    ] = "gumbel",
    runs: Runs = Path("runs"),
) -> None:
    """Make a key that marks a model's texts (serve --watermark FILE), or test texts for its mark."""
    from bessemer.core.errors import ConfigError

    if new and not texts:
        _make(key, method)
        return
    if new or not texts:
        raise ConfigError("watermark: give --new to make the key file, or the texts to test")
    if model is None:
        raise ConfigError("watermark: give the model whose tokens are tested, with --model")
    from bessemer.cli.show import opened_tokenizer
    from bessemer.inference.sampling.watermark import detect

    config = watermark_of(key)
    with opened_tokenizer(_tokenizer_name(model, runs), runs) as tokenizer:
        for name in texts:
            found = detect(tokenizer.encode(_read(name), add_bos=False), config)
            chance = f"{found.p_value:.3f}" if found.p_value >= 0.001 else f"{found.p_value:.0e}"
            print(f"{name}: {found.tokens:,} tokens tested, {found.score:+.1f} deviations, p = {chance}")


def watermark_of(path: Path) -> WatermarkConfig:
    """The settings of a key file. Raises ConfigError, naming the line."""
    from bessemer.core.yaml_file import read_yaml
    from bessemer.inference.sampling.params import WatermarkConfig

    written = read_yaml(path)
    return WatermarkConfig.parse(written.values, lambda place: written.where((), place))


def _make(path: Path, method: str) -> None:
    """A file that its owner alone may read; one that is there stays."""
    import os
    import secrets

    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import dump_yaml
    from bessemer.inference.sampling.params import WatermarkConfig

    values: dict[str, Any] = {"method": method, "key": secrets.token_urlsafe(24)}
    WatermarkConfig.parse(values, "--new")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(dump_yaml(values))
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; texts marked with its key can be tested only while it is kept") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"{path}: keep it secret, and keep it; bessemer serve MODEL --watermark {path}")


def _tokenizer_name(model: str, runs: Path) -> str:
    """The folder or file of a model's tokenizer, or the name as it is."""
    from bessemer.cli.named import find_model
    from bessemer.cli.show import tokenizer_folder

    if tokenizer_folder(model, runs) is not None or Path(model).is_file():
        return model
    return str(find_model(model, runs))


def _read(name: str) -> str:
    from bessemer.core.errors import SourceError

    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: is not UTF-8 text (byte {error.start})") from None
