"""What tells one model from another, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_bytes
from bessemer.model.tuned_folder import TunedModel, tuned_model

_ENDS = 1 << 20
_FILES = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json", "adapter_config.json")


def model_identity(place: Path, name: str, max_model_len: int | None = None, *, adapter: Path | None = None) -> dict[str, Any]:
    """The name of a model, a hash of its files, and the setting of the engine that changes what it reads.

    place: a GGUF file, a model's folder, or a fine-tuning's with an adapter of its own. adapter: the folder of one. Of
    each file the size and the first and last MiB are hashed: weights that were trained on differ there, and hundreds of
    gigabytes need not be read.
    """
    weights, own = tuned_model(place) or TunedModel(place, None)
    files = [weights] if weights.is_file() else _files(weights)
    beside = adapter or own
    files += [] if beside is None else _files(beside)
    parts = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as stream:
            beginning = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            parts += [str(size).encode(), beginning, stream.read(_ENDS)]
    return {"name": name, "weights": hash_bytes(*parts), "max_model_len": max_model_len}


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _FILES for path in folder.glob(pattern))
