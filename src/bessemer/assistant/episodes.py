"""Environments and their episodes: an assistant acts by messages and tools, and is rewarded.

Many episodes run at once on one engine. An episode goes on as soon as its message is complete, while others still generate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import LOCAL, Conversation, Principal, Transcript
from bessemer.assistant.generation import Generation
from bessemer.assistant.hooks import Hook
from bessemer.assistant.messages import EndReason, Message
from bessemer.assistant.tools import Tool
from bessemer.assistant.turn import Turn
from bessemer.core.errors import BessemerError
from bessemer.core.hashing import derive_seed
from bessemer.inference.request import Request
from bessemer.inference.sampling.params import SamplingParams


@dataclass(frozen=True)
class StepResult:
    """The environment's result of a turn.

    reward: of this turn; None: unknown, and so is the episode's. messages: to answer next; none: the episode is over.
    """

    reward: float | None
    messages: Sequence[Message] = ()


class Environment(Protocol):
    """The world of one episode at a time. Its tools may change its state."""

    @property
    def tools(self) -> Sequence[Tool]:
        """Tools of the assistant, the same for a whole episode."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begin an episode. Returns its first messages. task: a row of the data; seed: of all random draws."""

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        """Judge a turn, whose messages are the conversation's last. end: why the turn ended."""


@dataclass(frozen=True)
class TurnReward:
    """Reward of a turn. end: tokens of the transcript at its end; its last token is `end` − 1."""

    end: int
    reward: float


@dataclass
class Episode:
    """A played conversation. end: why its last turn ended. failure: an error of the environment, or a prompt that does not fit;
    such an episode is not to be trained on."""

    conversation: Conversation = field(default_factory=Conversation)
    rewards: list[TurnReward] = field(default_factory=list)
    end: EndReason | None = None
    failure: str = ""

    @property
    def transcript(self) -> Transcript:
        """Its tokens, with the mask of the policy's own and their log-probabilities."""
        return self.conversation.transcript

    @property
    def total(self) -> float:
        """The sum of the rewards; NaN where one is unknown."""
        return math.nan if self.failure else math.fsum(reward.reward for reward in self.rewards)


def play(
    assistant: Assistant,
    environments: Sequence[Environment],
    tasks: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    *,
    max_turns: int = 1,
    seeds: Sequence[int] | None = None,
    principal: Principal = LOCAL,
    hooks: Sequence[Hook] = (),
) -> list[Episode]:
    """An episode of each environment with its task.

    The assistant's model is an engine without other users; its tools are the environments'. params: of each message;
    log-probabilities are those at its temperature, as of `Engine.rollouts`. seeds: of each episode; by default its number. An
    error of an environment ends its own episode only.
    """
    model = assistant.model
    assert isinstance(model, EngineModel), "episodes are played with an engine"
    params = params.with_changes(logprobs=0, logprobs_mode="temperature")
    numbers = range(len(tasks)) if seeds is None else seeds
    players = [
        _Player(assistant, model, environment, task, params, seed, max_turns, principal, hooks)
        for environment, task, seed in zip(environments, tasks, numbers, strict=True)
    ]
    try:
        for player in players:
            player.advance()
        while under_way := [player for player in players if not player.is_over]:
            model.engine.step()
            for player in under_way:
                player.advance()
    finally:
        for player in players:
            player.stop()
    return [player.episode for player in players]


@dataclass
class _Player:
    """An episode under way."""

    assistant: Assistant
    model: EngineModel
    environment: Environment
    task: Mapping[str, Any]
    params: SamplingParams
    seed: int
    max_turns: int
    principal: Principal
    hooks: Sequence[Hook]
    episode: Episode = field(default_factory=Episode)
    is_over: bool = False
    _turn: Turn | None = None
    _turns: int = 0
    _generation: Generation | None = None
    _request: Request | None = None

    def advance(self) -> None:
        """Do everything that does not wait for the engine's next step."""
        try:
            while not self.is_over and self._advance_once():
                pass
        except BessemerError as error:
            self._break_off(str(error))

    def stop(self) -> None:
        """End the request under way."""
        request, self._request, self._generation = self._request, None, None
        if request is not None and not request.done:
            self.model.engine.stop(request)

    def _advance_once(self) -> bool:
        """Do one thing. False where the engine's next step comes first."""
        turn = self._turn
        if turn is None:
            self._begin_turn(self._ask_environment(first=True))
        elif turn.end is not None:
            self._begin_turn(self._ask_environment(first=False))
        elif turn.wants_tools:
            turn.run_tools()
        elif turn.generation is not self._generation:
            self.stop()
            assert turn.generation is not None
            self._generation = turn.generation
            self._request = self.model.prepare(turn.generation)
            self.model.engine.begin(self._request)
        else:
            return self._take_chunks(turn)
        return True

    def _take_chunks(self, turn: Turn) -> bool:
        assert self._request is not None
        chunks = self._request.drain()
        for chunk in chunks:
            turn.take(self.model.delta(chunk))
            if turn.generation is not self._generation:
                break
        return bool(chunks)

    def _ask_environment(self, *, first: bool) -> bool:
        """Reset the environment, or step it with the turn. Returns whether there are messages to answer."""
        episode = self.episode
        try:
            if first:
                messages = self.environment.reset(self.task, self.seed)
                if not messages:
                    raise ValueError("the environment begins with no message")
            else:
                assert self._turn is not None and self._turn.end is not None
                episode.end = self._turn.end.reason
                step = self.environment.step(episode.conversation, episode.end)
                reward = math.nan if step.reward is None else float(step.reward)
                episode.rewards.append(TurnReward(len(episode.transcript), reward))
                messages = step.messages
        except Exception as error:  # a user's environment may raise anything
            self._break_off(f"{type(error).__name__}: {error}")
            return False
        episode.conversation.add(*messages)
        return bool(messages)

    def _begin_turn(self, has_messages: bool) -> None:
        if self.is_over:
            return
        if not has_messages or self._turns >= self.max_turns:
            self.is_over = True
            return
        params = self.params.with_changes(seed=derive_seed(self.seed, "turn", self._turns))
        self._turns += 1
        self._generation = self._request = None
        self._turn = self.assistant.start(
            self.episode.conversation, self.principal, self.hooks, params=params, tools=self.environment.tools
        )
        self._turn.begin()
        generation = self._turn.generation
        if self._turns > 1 and generation is not None and len(generation.token_ids) >= self.model.context_length:
            self._turn.interrupt()
            self.episode.end = "length"
            self.is_over = True

    def _break_off(self, failure: str) -> None:
        self.stop()
        self.episode.failure = " ".join(failure.split()) or "failed without a reason"
        self.is_over = True
