"""Environments and their episodes: an assistant acts by messages and tools, and is rewarded.

Many episodes run at once on one engine: multi-turn data for a policy to learn from. An episode whose message is complete
continues at once, while messages of the others are still generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.config import LOCAL, Principal
from bessemer.assistant.conversation import Conversation, Transcript
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
class Step:
    """What an environment makes of a turn. messages: what the assistant answers next, nothing where the episode is over.

    reward: of this turn; None where it cannot be given: the episode has no reward then.
    """

    reward: float | None
    messages: Sequence[Message] = ()


class Environment(Protocol):
    """A world of one episode at a time. Its tools may change its state."""

    @property
    def tools(self) -> Sequence[Tool]:
        """What the assistant may call, the same for a whole episode."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begin an episode: what the assistant reads first. task: a row of the data; seed: for all that is drawn."""

    def step(self, conversation: Conversation, end: EndReason) -> Step:
        """After a turn, whose messages are the conversation's last, and which ended by `end`."""


@dataclass(frozen=True)
class TurnReward:
    """What a turn was worth. end: tokens of the transcript when it was over; its last token is `end` − 1."""

    end: int
    reward: float


@dataclass
class Episode:
    """A conversation that was played. end: of its last turn. failure: why it broke off, by an error of the environment or a
    prompt that does not fit; such an episode is no example."""

    conversation: Conversation = field(default_factory=Conversation)
    rewards: list[TurnReward] = field(default_factory=list)
    end: EndReason | None = None
    failure: str = ""

    @property
    def transcript(self) -> Transcript:
        """Its tokens, with the mask of those that the policy wrote and their log-probabilities."""
        return self.conversation.transcript

    @property
    def total(self) -> float:
        """The sum of the rewards; NaN where one could not be given."""
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

    The assistant's model is an engine that nobody else uses meanwhile, and its tools are the environments'. params: of each
    message; log-probabilities are of the distribution at its temperature, as `Engine.rollouts` gives them. seeds: of each
    episode; by default their numbers. An error of an environment ends its episode and no other.
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


class _Player:
    """An episode under way."""

    def __init__(
        self,
        assistant: Assistant,
        model: EngineModel,
        environment: Environment,
        task: Mapping[str, Any],
        params: SamplingParams,
        seed: int,
        max_turns: int,
        principal: Principal,
        hooks: Sequence[Hook],
    ) -> None:
        self.episode = Episode()
        self.is_over = False
        self._assistant = assistant
        self._model = model
        self._environment = environment
        self._task = task
        self._params = params
        self._seed = seed
        self._max_turns = max_turns
        self._principal = principal
        self._hooks = hooks
        self._turn: Turn | None = None
        self._turns = 0
        self._generation: Generation | None = None
        self._request: Request | None = None

    def advance(self) -> None:
        """Take what has come, and do what does not wait for the engine."""
        try:
            while not self.is_over and self._goes_on():
                pass
        except BessemerError as error:
            self._break_off(str(error))

    def stop(self) -> None:
        """End the request under way."""
        request, self._request, self._generation = self._request, None, None
        if request is not None and not request.done:
            self._model.engine.stop(request)

    def _goes_on(self) -> bool:
        """Do the next thing. False where the engine's next step comes first."""
        turn = self._turn
        if turn is None:
            self._begin_turn(self._environment_says(first=True))
        elif turn.end is not None:
            self._begin_turn(self._environment_says(first=False))
        elif turn.wants_tools:
            turn.run_tools()
        elif turn.generation is not self._generation:
            self.stop()
            assert turn.generation is not None
            self._generation = turn.generation
            self._request = self._model.prepare(turn.generation)
            self._model.engine.begin(self._request)
        else:
            return self._takes_chunks(turn)
        return True

    def _takes_chunks(self, turn: Turn) -> bool:
        assert self._request is not None
        chunks = self._request.drain()
        for chunk in chunks:
            turn.take(self._model.delta(chunk))
            if turn.generation is not self._generation:
                break
        return bool(chunks)

    def _environment_says(self, *, first: bool) -> bool:
        """Let the environment begin, or judge the turn. Returns whether there is something to answer."""
        episode = self.episode
        try:
            if first:
                messages = self._environment.reset(self._task, self._seed)
                if not messages:
                    raise ValueError("the environment begins with no message")
            else:
                assert self._turn is not None and self._turn.end is not None
                episode.end = self._turn.end.reason
                step = self._environment.step(episode.conversation, episode.end)
                reward = math.nan if step.reward is None else float(step.reward)
                episode.rewards.append(TurnReward(len(episode.transcript), reward))
                messages = step.messages
        except Exception as error:  # whatever a user's environment raises: this episode is left out
            self._break_off(f"{type(error).__name__}: {error}")
            return False
        episode.conversation.add(*messages)
        return bool(messages)

    def _begin_turn(self, has_messages: bool) -> None:
        if self.is_over:
            return
        if not has_messages or self._turns >= self._max_turns:
            self.is_over = True
            return
        params = self._params.with_changes(seed=derive_seed(self._seed, "turn", self._turns))
        self._turns += 1
        self._generation = self._request = None
        self._turn = self._assistant.start(
            self.episode.conversation, self._principal, self._hooks, params=params, tools=self._environment.tools
        )
        self._turn.begin()
        generation = self._turn.generation
        if self._turns > 1 and generation is not None and len(generation.token_ids) >= self._model.context_length:
            self._turn.interrupt()
            self.episode.end = "length"
            self.is_over = True

    def _break_off(self, failure: str) -> None:
        self.stop()
        self.episode.failure = " ".join(failure.split()) or "failed without a reason"
        self.is_over = True
