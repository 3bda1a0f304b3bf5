"""Where a model of this machine lies, and the hashes of its files. Imports no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.tasks.judged import JudgeConfig

#: Files of a model's folder that decide what it answers; the first is in every such folder.
_CONFIG, _FILES = "config.json", ("*.safetensors", "*.json", "*.jinja")


def model_place(name: str, folder: Path) -> Path:
    """The folder or GGUF file of a model, from `folder`; that of a run or a stage will do. Raises ConfigError without one."""
    place = Path(os.path.normpath(folder.resolve() / name))
    for found in (follow(place), follow(place / "model")):
        if (found.is_file() and found.suffix == ".gguf") or (found / _CONFIG).is_file():
            return found
    raise ConfigError(f"{name}: there is no model's folder and no GGUF file {place}; a model elsewhere has a url")


def place_fingerprint(place: Path) -> dict[str, str]:
    """Hashes of a GGUF file, or of the files of a model's folder."""
    files = [place] if place.is_file() else sorted(path for pattern in _FILES for path in place.glob(pattern))
    return {path.name: hash_file(path) for path in files}


def chat_models_fingerprint(configs: Sequence[JudgeConfig | None], folder: Path) -> list[dict[str, str]]:
    """Hashes of the files of those models that lie on this machine, for a stage's key. Raises as `model_place`."""
    return [
        place_fingerprint(model_place(config.model, folder)) for config in configs if config is not None and config.url is None
    ]
