"""What tells one model from another, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_bytes

_ENDS = 1 << 20
_FILES = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json")


def model_identity(place: Path, name: str, max_model_len: int | None = None) -> dict[str, Any]:
    """The name of a model, a hash of its files, and the setting of the engine that changes what it reads.

    place: a GGUF file or a model's folder. Of each file the size and the first and last MiB are hashed: weights that were
    trained on differ there, and hundreds of gigabytes need not be read.
    """
    files = [place] if place.is_file() else sorted(path for pattern in _FILES for path in place.glob(pattern))
    parts = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as stream:
            beginning = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            parts += [str(size).encode(), beginning, stream.read(_ENDS)]
    return {"name": name, "weights": hash_bytes(*parts), "max_model_len": max_model_len}
