"""Models that write or judge data: an engine on this machine, or a server at a URL.

Settings, the folder of a model and the hashes of its files, and opening it. Imports no PyTorch before a model is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.chat_client import ChatModel
from bessemer.core.config import setting
from bessemer.tasks.judged import JudgeConfig, chat_models_fingerprint, model_place, place_fingerprint

__all__ = [
    "CUT_REASON",
    "ChatModelConfig",
    "chat_models_fingerprint",
    "model_place",
    "open_chat_model",
    "place_fingerprint",
    "provenance",
]

#: Why a row with a part cut at `max_tokens` is left out: the model would learn to end there.
CUT_REASON = "cut at max_tokens"


class ChatModelConfig(JudgeConfig):
    """A model that writes or judges: at an OpenAI-compatible URL, or in a folder on this machine."""

    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)
    temperature: float = setting(0.0, "temperature of its answers; 0: the likeliest token each time", ge=0, allow_inf_nan=False)


def open_chat_model(config: JudgeConfig, folder: Path, device: str = "auto") -> ChatModel:
    """The model that settings name; a relative path starts from `folder`.

    Raises ConfigError for a URL that is none, a key that is not set and a folder without a model, ArtefactError for a model
    that is damaged.
    """
    temperature = config.temperature if isinstance(config, ChatModelConfig) else 0.0
    # imported late: it loads PyTorch, and settings import this module
    from bessemer.inference.chat import open_chat

    return open_chat(config, folder, device, temperature=temperature)


def provenance(config: ChatModelConfig) -> dict[str, Any]:
    """Record of a text's origin: the model's name and place, and its sampling settings."""
    place = {} if config.url is None else {"url": config.url}
    return {"model": config.model, **place, "temperature": config.temperature, "max_tokens": config.max_tokens}
