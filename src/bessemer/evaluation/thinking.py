"""Answers after thinking within a budget: conversations of one turn, many at once on an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.config import AssistantConfig
from bessemer.assistant.conversation import Conversation
from bessemer.assistant.episodes import Episode, StepResult, play
from bessemer.assistant.messages import EndReason, Message, as_messages
from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tasks.questions import Context


@dataclass(frozen=True)
class ThoughtAnswer:
    """An answer and the thinking before it. tokens: all that were generated, with thinking and tags.

    is_closed: whether the budget closed the thinking.
    """

    text: str
    thinking: str
    tokens: int
    is_closed: bool
    finish_reason: Literal["stop", "length"]


def answers_after_thinking(
    engine: Engine, contexts: Sequence[Context], params: SamplingParams, budget: int, seeds: Sequence[int]
) -> list[ThoughtAnswer]:
    """An answer to each conversation, whose thinking is closed where it reaches `budget` tokens.

    params: `max_tokens` is of thinking and answer together. seeds: of each answer. Raises RequestError for a conversation that
    does not fit the model's context.
    """
    assistant = Assistant(EngineModel(engine), params, config=AssistantConfig(thinking_budget=budget))
    episodes = play(
        assistant, [_SingleQuestion() for _ in contexts], [{"context": each} for each in contexts], params, seeds=seeds
    )
    return [_answer(episode) for episode in episodes]


class _SingleQuestion:
    """An environment of one question, without rewards."""

    tools = ()

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        return as_messages(task["context"])

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        return StepResult(None)


def _answer(episode: Episode) -> ThoughtAnswer:
    if episode.failure:
        raise RequestError(episode.failure)
    said, transcript = episode.conversation.messages[-1], episode.transcript
    first = transcript.is_own.index(True)
    return ThoughtAnswer(
        said.text,
        said.thinking,
        transcript.own_tokens,
        not all(transcript.is_own[first:]),
        "length" if episode.end == "length" else "stop",
    )
