"""Opens the models that settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.chat_client import ChatModel
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.posttraining.chat_models.config import ChatModelConfig
from bessemer.posttraining.chat_models.files import model_place
from bessemer.tasks.judged import JudgeConfig, chat_client


def open_chat_model(config: JudgeConfig, folder: Path, device: str = "auto") -> ChatModel:
    """The model that settings name; a relative path starts from `folder`.

    Raises ConfigError for a URL that is none, a key that is not set and a folder without a model, ArtefactError for a model
    that is damaged.
    """
    temperature = config.temperature if isinstance(config, ChatModelConfig) else 0.0
    if config.url is not None:
        return chat_client(config, temperature)
    engine = Engine(model_place(config.model, folder), device=device)
    return EngineChat(engine, max_tokens=config.max_tokens, temperature=temperature)


def provenance(config: ChatModelConfig) -> dict[str, Any]:
    """What is written down of a model beside what it wrote: its name and place, and how it was sampled."""
    place = {} if config.url is None else {"url": config.url}
    return {"model": config.model, **place, "temperature": config.temperature, "max_tokens": config.max_tokens}
