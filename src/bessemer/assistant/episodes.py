"""Environments and their episodes: an assistant acts by messages and tools, and is rewarded.

Many episodes run at once, on one engine or on servers. An episode goes on as soon as its message is complete, while others
still generate; with threads, also while the environments and the tools of others wait.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import LOCAL, Conversation, Principal, Transcript
from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.hooks import Hook
from bessemer.assistant.messages import EndReason, Message
from bessemer.assistant.tools import Tool
from bessemer.assistant.turn import Turn
from bessemer.core.concurrency import DaemonThreads
from bessemer.core.errors import BessemerError
from bessemer.core.hashing import derive_seed
from bessemer.inference.request import Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class StepResult:
    """The environment's result of a turn.

    reward: of this turn; None: unknown, and so is the episode's. messages: to answer next; none: the episode is over.
    """

    reward: float | None
    messages: Sequence[Message] = ()


class Environment(Protocol):
    """The world of one episode at a time. Its tools may change its state.

    Where it has an attribute `waits` that is true, it mostly waits for something else (a network, another process), and its
    calls are made by threads; those of one episode come one after the other in any case. Where it has a method `close`, that is
    called at the end.
    """

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
    such an episode is not to be trained on. waited: seconds in the environment and its tools."""

    conversation: Conversation = field(default_factory=Conversation)
    rewards: list[TurnReward] = field(default_factory=list)
    end: EndReason | None = None
    failure: str = ""
    waited: float = 0.0

    @property
    def transcript(self) -> Transcript:
        """Its tokens, with the mask of the policy's own and their log-probabilities."""
        return self.conversation.transcript

    @property
    def total(self) -> float:
        """The sum of the rewards; NaN where one is unknown."""
        return math.nan if self.failure else math.fsum(reward.reward for reward in self.rewards)


@runtime_checkable
class RemoteModel(Protocol):
    """A model that a thread waits for, on other machines for example, with token ids in and out."""

    @property
    def tokenizer(self) -> Tokenizer:
        """As of `ChatModel`."""

    @property
    def context_length(self) -> int:
        """As of `ChatModel`."""

    def complete(self, generation: Generation) -> Sequence[Delta]:
        """The whole completion, a delta for each token."""


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
    threads: DaemonThreads | None = None,
    waits: bool | None = None,
) -> list[Episode]:
    """An episode of each environment with its task.

    The assistant's model is an engine without other users, or a `RemoteModel`; its tools are the environments'. params: of each
    message; log-probabilities are those at its temperature, as in `Engine.rollouts`. seeds: of each episode; by default its
    number. An error of an environment ends its own episode only.

    threads: for what is waited for: completions of a remote model, and calls of environments and their tools that wait (waits:
    whether they all do; None: those that say so). Without threads an episode's environment holds up the others, and the
    engine's batches are the same at each run.
    """
    model = assistant.model
    assert isinstance(model, EngineModel | RemoteModel), (
        "episodes are played with an engine, or with a model that is waited for"
    )
    assert isinstance(model, EngineModel) or threads is not None, "threads wait for a remote model"
    params = params.with_changes(logprobs=0, logprobs_mode="temperature")
    numbers = range(len(tasks)) if seeds is None else seeds
    players = [
        _Player(
            assistant,
            model,
            environment,
            task,
            params,
            seed,
            max_turns,
            principal,
            hooks,
            threads,
            threads if waits or (waits is None and getattr(environment, "waits", False)) else None,
        )
        for environment, task, seed in zip(environments, tasks, numbers, strict=True)
    ]
    try:
        for player in players:
            player.advance()
        while under_way := [player for player in players if not player.is_over]:
            if isinstance(model, EngineModel) and model.engine.core.busy:
                model.engine.step()
            else:
                wait([call for player in under_way if (call := player.waits_for) is not None], return_when=FIRST_COMPLETED)
            for player in under_way:
                player.advance()
    finally:
        for player in players:
            player.stop()
            player.close()
    return [player.episode for player in players]


class _Completing(ABC):
    """A completion under way."""

    #: A call that has to end before anything comes; None: the engine's next step gives more.
    call: Future[Sequence[Delta]] | None = None

    @abstractmethod
    def drain(self) -> Sequence[Delta]:
        """What came since the last call."""

    @abstractmethod
    def stop(self) -> None:
        """Generate no more."""


class _OnEngine(_Completing):
    def __init__(self, model: EngineModel, generation: Generation) -> None:
        self._model = model
        self._request: Request = model.prepare(generation)
        model.engine.begin(self._request)

    def drain(self) -> Sequence[Delta]:
        return [self._model.delta(chunk) for chunk in self._request.drain()]

    def stop(self) -> None:
        if not self._request.done:
            self._model.engine.stop(self._request)


class _Remote(_Completing):
    def __init__(self, model: RemoteModel, generation: Generation, threads: DaemonThreads) -> None:
        self.call = threads.submit(lambda: model.complete(generation))

    def drain(self) -> Sequence[Delta]:
        if self.call is None or not self.call.done():
            return []
        call, self.call = self.call, None
        return call.result()

    def stop(self) -> None:
        """A server is left to finish what it has begun."""


@dataclass
class _Player:
    """An episode under way. threads: for a remote model; environment_threads: for the environment and its tools; None: its own
    calls are made at once."""

    assistant: Assistant
    model: EngineModel | RemoteModel
    environment: Environment
    task: Mapping[str, Any]
    params: SamplingParams
    seed: int
    max_turns: int
    principal: Principal
    hooks: Sequence[Hook]
    threads: DaemonThreads | None = None
    environment_threads: DaemonThreads | None = None
    episode: Episode = field(default_factory=Episode)
    is_over: bool = False
    _turn: Turn | None = None
    _turns: int = 0
    _generation: Generation | None = None
    _completing: _Completing | None = None
    #: A call of the environment or of tools under way, and what is done with its result.
    _call: Future[Any] | None = None
    _then: Callable[[Any], None] = lambda _: None

    @property
    def waits_for(self) -> Future[Any] | None:
        """The call that has to end before the episode goes on; None: the engine's next step."""
        return self._call or (None if self._completing is None else self._completing.call)

    def advance(self) -> None:
        """Do everything that does not wait."""
        try:
            while not self.is_over and self._advance_once():
                pass
        except BessemerError as error:
            self._break_off(str(error))

    def stop(self) -> None:
        """End the completion under way."""
        completing, self._completing, self._generation = self._completing, None, None
        if completing is not None:
            completing.stop()

    def close(self) -> None:
        """Let the environment go, when its last call has ended."""
        close = getattr(self.environment, "close", None)
        if close is None:
            return
        if self._call is not None:
            # the play was broken off: nobody waits for that call
            self._call.add_done_callback(lambda _: close())
        else:
            close()

    def _advance_once(self) -> bool:
        """Do one thing. False where something else comes first."""
        if self._call is not None:
            if not self._call.done():
                return False
            call, self._call = self._call, None
            self._then(call.result())
            return True
        turn = self._turn
        if turn is None:
            self._outside(lambda: self._ask_environment(first=True), self._begin_turn)
        elif turn.end is not None:
            self._outside(lambda: self._ask_environment(first=False), self._begin_turn)
        elif turn.wants_tools:
            self._outside(turn.run_tools, lambda events: None)
        elif turn.generation is not self._generation:
            self.stop()
            assert turn.generation is not None
            self._generation = turn.generation
            if isinstance(self.model, EngineModel):
                self._completing = _OnEngine(self.model, turn.generation)
            else:
                assert self.threads is not None
                self._completing = _Remote(self.model, turn.generation, self.threads)
        else:
            return self._take_deltas(turn)
        return True

    def _outside(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call the environment or tools, in a thread where they wait, and go on with the result."""

        def timed() -> Any:
            started = time.perf_counter()
            try:
                return call()
            finally:
                self.episode.waited += time.perf_counter() - started

        if self.environment_threads is None:
            then(timed())
        else:
            self._call, self._then = self.environment_threads.submit(timed), then

    def _take_deltas(self, turn: Turn) -> bool:
        assert self._completing is not None
        deltas = self._completing.drain()
        for delta in deltas:
            turn.take(delta)
            if turn.generation is not self._generation:
                break
        return bool(deltas)

    def _ask_environment(self, *, first: bool) -> Sequence[Message]:
        """Reset the environment, or step it with the turn. Returns the messages to answer."""
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
            return ()
        return messages

    def _begin_turn(self, messages: Sequence[Message]) -> None:
        if self.is_over:
            return
        self.episode.conversation.add(*messages)
        if not messages or self._turns >= self.max_turns:
            self.is_over = True
            return
        params = self.params.with_changes(seed=derive_seed(self.seed, "turn", self._turns))
        self._turns += 1
        self._generation = self._completing = None
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
