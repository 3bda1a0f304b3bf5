"""A chat model on this machine, with the interface of one behind a URL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bessemer.core.chat_client import ChatModel, ChatPrompt, CutText, messages_of
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tasks.judged import JudgeConfig, chat_client, model_place


class EngineChat:
    """Conversations with an engine's model: a `ChatModel`. A prompt that its context does not hold is answered by nothing."""

    def __init__(self, engine: Engine, *, max_tokens: int = 512, temperature: float = 0.0) -> None:
        self._engine = engine
        self._params = SamplingParams(max_tokens=max_tokens, temperature=temperature)

    def ask(self, prompts: Sequence[ChatPrompt], seeds: Sequence[int] | None = None) -> list[str]:
        """As of `ChatModel`; "" to a prompt that fills the context. Raises RequestError for messages that are malformed.

        An answer is cut by the end of the context too.
        """
        encoded = self._encoded(prompts)
        fitting = [index for index, ids in enumerate(encoded) if len(ids) < self._engine.longest]
        params = [
            self._params if seeds is None else self._params.model_copy(update={"seed": seeds[index]}) for index in fitting
        ]
        answers = [""] * len(prompts)
        completions = self._engine.generate([encoded[index] for index in fitting], params)
        for index, completion in zip(fitting, completions, strict=True):
            answers[index] = CutText(completion.text) if completion.finish_reason == "length" else completion.text
        return answers

    def choose(self, prompts: Sequence[ChatPrompt], options: Sequence[str]) -> list[list[float] | None]:
        """As of `ChatModel`, by the log-probabilities of the whole options; None for a prompt that leaves no room for them."""
        tokenizer = self._engine.tokenizer
        continuations = [tokenizer.encode(option, add_bos=False) for option in options]
        longest = self._engine.longest - max(map(len, continuations))
        encoded = self._encoded(prompts)
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= longest]
        chosen: list[list[float] | None] = [None] * len(prompts)
        scored = self._engine.score_items([(encoded[index], continuations) for index in fitting])
        for index, scores in zip(fitting, scored, strict=True):
            highest = max(score.total for score in scores)
            weights = [math.exp(score.total - highest) for score in scores]
            chosen[index] = [weight / sum(weights) for weight in weights]
        return chosen

    def _encoded(self, prompts: Sequence[ChatPrompt]) -> list[list[int]]:
        tokenizer = self._engine.tokenizer
        return [tokenizer.apply_chat_template(messages_of(prompt), add_generation_prompt=True) for prompt in prompts]


def open_chat(config: JudgeConfig, folder: Path, device: str = "auto", *, temperature: float = 0.0) -> ChatModel:
    """The model that settings name, at a URL or on this machine; a relative path starts from `folder`.

    Raises ConfigError for a URL that is none, a key that is not set and a folder without a model, ArtefactError for a model
    that is damaged.
    """
    if config.url is not None:
        return chat_client(config, temperature)
    engine = Engine(model_place(config.model, folder), device=device)
    return EngineChat(engine, max_tokens=config.max_tokens, temperature=temperature)
