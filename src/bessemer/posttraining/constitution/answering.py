"""Answers of the model above to prompts that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bessemer.core.chat_client import ChatModel, CutText
from bessemer.core.hashing import hash_value
from bessemer.core.policy import Policy
from bessemer.core.seeds import derive_seed
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.posttraining.chat_models.files import chat_models_fingerprint, place_fingerprint
from bessemer.posttraining.chat_models.opening import open_chat_model
from bessemer.posttraining.constitution.config import PrincipledConfig
from bessemer.posttraining.constitution.prompts import Asked


class Speakers:
    """The model that answers, and the one that criticises or compares, which may be the same; opened when first asked."""

    def __init__(self, config: PrincipledConfig, model: Path, folder: Path, device: str) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        self._device = device

    @cached_property
    def answering(self) -> ChatModel:
        """The model above. Raises ArtefactError for a damaged one."""
        return EngineChat(self._engine, max_tokens=self._config.max_tokens, temperature=self._config.temperature)

    @cached_property
    def critic(self) -> ChatModel:
        """The critic of the settings, or the model above, greedily. Raises as `open_chat_model`."""
        if self._config.critic is None:
            return EngineChat(self._engine, max_tokens=self._config.max_tokens)
        return open_chat_model(self._config.critic, self._folder, self._device)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._model, device=self._device)


@dataclass(frozen=True)
class GivenAnswer:
    """What the data or the model says to a prompt. is_cut: the model came to `max_tokens` before it ended."""

    text: str
    is_cut: bool = False


def answered(speakers: Speakers, asked: Sequence[Asked], rows: Sequence[int], count: int, seed: int) -> list[list[GivenAnswer]]:
    """`count` answers to each prompt: those of the data first, and as many of the model's as are missing.

    rows: the numbers of the prompts in the whole data, from which their seeds derive.
    """
    missing = [(place, number) for place, one in enumerate(asked) for number in range(len(one.answers), count)]
    prompts = [asked[place].prompt for place, _ in missing]
    seeds = [derive_seed(seed, "answer", rows[place], number) for place, number in missing]
    answers = [[GivenAnswer(text) for text in one.answers[:count]] for one in asked]
    if missing:
        for (place, _), answer in zip(missing, speakers.answering.ask(prompts, seeds), strict=True):
            answers[place].append(GivenAnswer(answer.strip(), isinstance(answer, CutText)))
    return answers


def work_identity(
    config: PrincipledConfig, model: Path, asked: Sequence[Asked], policy: Policy, folder: Path, seed: int
) -> Any:
    """What the rows of a stage depend on."""
    return {
        "settings": config.output_settings(),
        "model": place_fingerprint(model),
        "critic": chat_models_fingerprint([config.critic], folder),
        "policy": policy.model_dump(mode="json"),
        "data": hash_value([[list(one.prompt), list(one.answers)] for one in asked]),
        "seed": seed,
    }
