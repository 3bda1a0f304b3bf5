"""Models that write or judge data: an engine on this machine, or a server at a URL.

Settings, the folder of a model and the hashes of its files, and opening it. Imports no PyTorch before a model is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.core.chat_client import ChatModel
from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.tasks.judged import JudgeConfig, chat_client

#: Why a row with a part cut at `max_tokens` is left out: the model would learn to end there.
CUT_REASON = "cut at max_tokens"


class ChatModelConfig(JudgeConfig):
    """A model that writes or judges: at an OpenAI-compatible URL, or in a folder on this machine."""

    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)
    temperature: float = setting(0.0, "temperature of its answers; 0: the likeliest token each time", ge=0, allow_inf_nan=False)


#: Files of a model's folder that decide what it answers; the first is in every such folder.
_CONFIG, _FILES = "config.json", ("*.safetensors", "*.json", "*.jinja")


def model_place(name: str, folder: Path) -> Path:
    """The folder or GGUF file of a model, relative to `folder`; a run's or a stage's folder also names its model. Raises
    ConfigError if there is none."""
    place = Path(os.path.normpath(folder.resolve() / name))
    for folder in (follow(place), follow(place / "model")):
        if (folder.is_file() and folder.suffix == ".gguf") or (folder / _CONFIG).is_file():
            return folder
    raise ConfigError(f"{name}: there is no model's folder and no GGUF file {place}; a model elsewhere has a url")


def place_fingerprint(place: Path) -> dict[str, str]:
    """Hashes of a GGUF file, or of the files of a model's folder."""
    files = [place] if place.is_file() else sorted(path for pattern in _FILES for path in place.glob(pattern))
    return {path.name: hash_file(path) for path in files}


def chat_models_fingerprint(configs: Sequence[JudgeConfig | None], folder: Path) -> list[dict[str, str]]:
    """Hashes of the files of the models on this machine, for a stage's key. Raises as `model_place`."""
    return [
        place_fingerprint(model_place(config.model, folder)) for config in configs if config is not None and config.url is None
    ]


def open_chat_model(config: JudgeConfig, folder: Path, device: str = "auto") -> ChatModel:
    """The model that settings name; a relative path starts from `folder`.

    Raises ConfigError for a URL that is none, a key that is not set and a folder without a model, ArtefactError for a model
    that is damaged.
    """
    temperature = config.temperature if isinstance(config, ChatModelConfig) else 0.0
    if config.url is not None:
        return chat_client(config, temperature)
    # imported late: these load PyTorch, and settings import this module
    from bessemer.inference.chat import EngineChat
    from bessemer.inference.engine import Engine

    engine = Engine(model_place(config.model, folder), device=device)
    return EngineChat(engine, max_tokens=config.max_tokens, temperature=temperature)


def provenance(config: ChatModelConfig) -> dict[str, Any]:
    """Record of a text's origin: the model's name and place, and its sampling settings."""
    place = {} if config.url is None else {"url": config.url}
    return {"model": config.model, **place, "temperature": config.temperature, "max_tokens": config.max_tokens}
