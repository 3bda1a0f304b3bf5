"""`bessemer import` and `bessemer export`: models and tokenizers of other tools, and for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Runs

if TYPE_CHECKING:
    from bessemer.model.formats import ExportOptions
    from bessemer.model.formats.gguf_imatrix import ImportanceMatrix


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
    from bessemer.model.storage.model_config import read_decoder_config

    for note in import_model(model, out, dtype=dtype, split=split):
        print(f"note: {note}")
    config = read_decoder_config(out)
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
            help="gguf, safetensors, onnx, tensorrt or imatrix; of a tokenizer gguf, sentencepiece or tiktoken. By OUT's "
            "suffix if none."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number type of a model's weights: f32, f16, bf16; gguf also q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, "
            "q4_0, q4_1. As they are if none."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="gguf: text on which the importance of each weight's inputs is measured, by which codes are chosen: a run, "
            "its tokens, a folder of documents or a text file."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of --calibrate.", min=256)] = 65_536,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="gguf: an importance matrix of llama-imatrix; with --calibrate, the file to write it to (.dat, .gguf)."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="gguf: write this adapter of MODEL alone, for llama.cpp's --lora.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="gguf: of what finetune wrote, write the adapter alone.")
    ] = False,
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

    formats = list(dict.fromkeys([*MODEL_FORMATS, "imatrix", *FORMATS]))
    format = format or _OF_SUFFIX.get(out.suffix)
    if format is None:
        raise ConfigError(f"--format: {out} does not tell it by its name; formats: {', '.join(formats)}")
    if format not in formats:
        raise ConfigError(f"--format: there is no {format!r}{nearest(format, formats)}; formats: {', '.join(formats)}")
    options = ExportOptions(dtype=dtype, shard_bytes=_bytes(shard_size))
    if adapter is not None or adapter_only:
        if format != "gguf" or tokenizer_only or shard_size or calibrate or imatrix:
            raise ConfigError("--adapter, --adapter-only: an adapter alone is written as gguf, with --dtype f32 or f16")
        _export_adapter(source, adapter, out, dtype, runs)
        return
    if format == "imatrix" and (calibrate is None or imatrix is not None or options != ExportOptions()):
        raise ConfigError("--format imatrix: give --calibrate TEXT; OUT is the file that is written")
    measured = calibrate is not None or imatrix is not None
    if measured and format not in ("gguf", "imatrix"):
        raise ConfigError(f"--calibrate, --imatrix: --format {format} has no such options")
    if measured and format == "gguf" and (dtype is None or not dtype.startswith(("q4", "q5", "q6"))):
        raise ConfigError(
            "--calibrate, --imatrix: choose codes of 4 to 6 bits with --dtype, as q4_k_m; others are exact enough"
        )
    if "@" in Path(source).name and not Path(source).exists() and not is_hub_name(source):
        if measured:
            raise ConfigError("--calibrate, --imatrix: of a model; export the checkpoint as a folder first")
        _export_checkpoint(source, out, format, options)
        return
    place = follow(Path(source))
    if not (place / "tokenizer.json").exists():
        place = find_model(source, runs)
    of_model = (format in MODEL_FORMATS or format == "imatrix") and not tokenizer_only
    if of_model:
        refuse_checkpoint(place)
    with as_folder(place, out) as folder:
        if of_model and holds_weights(folder):
            if measured:
                written = out if format == "imatrix" else imatrix
                found = _importance(folder, calibrate, written, calibration_tokens)
                if format == "imatrix":
                    print(f"{out}: the importance of {len(found.entries)} weights' inputs")
                    return
                options = replace(options, importance=found)
            notes = export_model(folder, out, format, options)
        elif format in FORMATS:
            if options != ExportOptions():
                raise ConfigError("--dtype, --shard-size: of a model's weights, and a tokenizer is written here")
            notes = export_tokenizer(folder, out, format)
        else:
            raise ArtefactError(f"{source}: holds no model (as safetensors) to export")
    _say(notes, out)


def _importance(folder: Path, text: Path | None, file: Path | None, tokens: int) -> ImportanceMatrix:
    """The importance of a model's inputs: measured on a text and written to the file, if one is named; or read from it."""
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.evaluation.quantisation import calibration_rows, opened_tokens
    from bessemer.model.formats.gguf_export import as_llama_cpp
    from bessemer.model.formats.gguf_imatrix import compute_importance, matrices_of, read_importance, write_importance
    from bessemer.model.storage.folder import load_model
    from bessemer.model.storage.model_config import read_model_config, refuse_quantised
    from bessemer.tokenization.tokenizer import load_tokenizer

    if text is None:
        assert file is not None
        config, family, _ = as_llama_cpp(read_model_config(folder), folder)
        return read_importance(file, matrices_of(config, family))
    if file is not None and file.exists():
        raise ConfigError(f"--imatrix: {file} exists already; leave out --calibrate to read it, or name another file")
    refuse_quantised(folder)
    model = load_model(folder)
    _, family, _ = as_llama_cpp(model.config, folder)
    length = min(512, model.config.max_position_embeddings)
    with opened_tokens(text, load_tokenizer(folder)) as opened:
        if opened.train is None:
            raise ArtefactError(f"{text}: no text to read")
        rows = calibration_rows(opened.train, tokens=tokens, length=length, seed=0)
        found = compute_importance(model, family, rows, dataset=text.name, progress=progress_for_terminal())
    if file is not None:
        write_importance(found, file)
    return found


def _export_adapter(source: str, adapter: Path | None, out: Path, dtype: str | None, runs: Path) -> None:
    """Write an adapter alone: of a model, or of what finetune wrote."""
    from bessemer.cli.named import find_model
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.model.formats.gguf_adapter import export_adapter
    from bessemer.model.storage.tuned_folder import tuned_model

    if out.is_dir():
        raise ArtefactError(f"{out}: is a folder; name the file to write")
    if adapter is None:
        tuned = tuned_model(Path(source), whole=False)
        if tuned is None:
            raise ConfigError(f"--adapter-only: {source} is not what finetune wrote; name its adapter with --adapter")
        base, adapter = tuned
        if adapter is None:
            raise ArtefactError(f"{source}: all weights were tuned, and it has no adapter; leave out --adapter-only")
    else:
        base = find_model(source, runs)
    if base.is_file():
        raise ArtefactError(f"{base}: a GGUF file takes no adapter here; import it first: bessemer import {base} FOLDER")
    _say(export_adapter(base, adapter, out, dtype), out)


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
