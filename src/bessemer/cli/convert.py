"""`bessemer import` and `bessemer export`: models and tokenizers of other tools, and for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Runs

if TYPE_CHECKING:
    from bessemer.model.formats import ExportOptions


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
        from bessemer.model.formats import find_model

        model = find_model(source)
    if model is None:
        if dtype is not None:
            raise ConfigError("--dtype: of a model's weights, and this is a tokenizer")
        _import_tokenizer(source, out, split, special or [])
        return
    if special:
        raise ConfigError("--special: for a tokenizer in a tiktoken file, and this is a model")
    from bessemer.model.formats import import_model
    from bessemer.model.storage.folder import read_model_config

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


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model: a folder, a GGUF file, a run, a pulled one, what finetune wrote, or RUN@STEP for a checkpoint. Or a "
            "tokenizer's folder.",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The file to write, or the folder.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="gguf, safetensors, onnx or tensorrt; of a tokenizer gguf, sentencepiece or tiktoken. By OUT's suffix if none."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number type of a model's weights: f32, f16, bf16; gguf also q8_0, q4_0, q4_1. As they are if none."),
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help="safetensors: the most that one file holds (5GB, 500MB).")] = None,
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="gguf: of a model's folder, write the tokenizer alone.")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write a model, or a tokenizer, for another tool."""
    from bessemer.cli.named import as_folder, find_model
    from bessemer.core.config import nearest
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.core.store import follow
    from bessemer.model.formats import MODEL_FORMATS, ExportOptions, export_model
    from bessemer.model.storage.library import holds_weights, is_hub_name, refuse_checkpoint
    from bessemer.tokenization.formats import FORMATS, export_tokenizer

    formats = list(dict.fromkeys([*MODEL_FORMATS, *FORMATS]))
    format = format or _OF_SUFFIX.get(out.suffix)
    if format is None:
        raise ConfigError(f"--format: {out} does not tell it by its name; formats: {', '.join(formats)}")
    if format not in formats:
        raise ConfigError(f"--format: there is no {format!r}{nearest(format, formats)}; formats: {', '.join(formats)}")
    options = ExportOptions(dtype=dtype, shard_bytes=_bytes(shard_size))
    if "@" in Path(source).name and not Path(source).exists() and not is_hub_name(source):
        _export_checkpoint(source, out, format, options)
        return
    place = follow(Path(source))
    if not (place / "tokenizer.json").exists():
        place = find_model(source, runs)
    of_model = format in MODEL_FORMATS and not tokenizer_only
    if of_model:
        refuse_checkpoint(place)
    with as_folder(place, out) as folder:
        if of_model and holds_weights(folder):
            notes = export_model(folder, out, format, options)
        elif format in FORMATS:
            if options != ExportOptions():
                raise ConfigError("--dtype, --shard-size: of a model's weights, and a tokenizer is written here")
            notes = export_tokenizer(folder, out, format)
        else:
            raise ArtefactError(f"{source}: holds no model (as safetensors) to export")
    _say(notes, out)


#: Suffix of a file → its format.
_OF_SUFFIX = {".gguf": "gguf", ".onnx": "onnx", ".model": "sentencepiece", ".tiktoken": "tiktoken"}


def _export_checkpoint(name: str, out: Path, format: str, options: ExportOptions) -> None:
    """Export the model of a run's checkpoint, by way of a temporary folder."""
    from tempfile import TemporaryDirectory

    from bessemer.core.errors import ConfigError, writing_to
    from bessemer.model.formats import MODEL_FORMATS, export_model
    from bessemer.model.storage.folder import save_model
    from bessemer.training.checkpoint.export import checkpoint_model, find_checkpoint

    if format not in MODEL_FORMATS:
        raise ConfigError(f"--format: a checkpoint is a model, which is written as {', '.join(MODEL_FORMATS)}")
    model, tokenizer = checkpoint_model(find_checkpoint(name, Path(), where="RUN@STEP"))
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".partial")
    with scratch as folder:
        with writing_to(out):
            save_model(model, Path(folder), tokenizer=tokenizer)
        notes = export_model(Path(folder), out, format, options)
    _say(notes, out)


def _say(notes: list[str], out: Path) -> None:
    for note in notes:
        print(f"note: {note}")
    print(f"{out}: written, {_size(out) / 1e6:,.1f} MB")


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(size: str | None) -> int | None:
    """Bytes of a size such as 5GB. Raises ConfigError for anything else."""
    from bessemer.core.errors import ConfigError

    if size is None:
        return None
    number, unit = size[:-2], size[-2:].upper()
    if unit not in _UNITS or not number.strip().isdigit() or int(number) < 1:
        raise ConfigError(f"--shard-size: {size!r} is no size; write 5GB or 500MB")
    return int(number) * _UNITS[unit]


def _size(out: Path) -> int:
    """Bytes of a folder, or of a file and those whose names begin with its name."""
    from bessemer.core.store import folder_bytes

    return folder_bytes(out) if out.is_dir() else sum(path.stat().st_size for path in out.parent.glob(f"{out.name}*"))
