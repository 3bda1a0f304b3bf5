"""The engine behind the application: admission, the assistant's turns, and the engine's errors as the API's.

A thread steps the engine while any request is in flight (`bessemer.inference.async_generation`), and the event loop never
waits for it. `Turns` are several answers to one conversation, each to the end of its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.messages import Event
from bessemer.assistant.turn import Turn
from bessemer.core.errors import BessemerError
from bessemer.inference.async_generation import ChoiceChunk, StepDriver, SteppedEngine
from bessemer.inference.capture import Capture
from bessemer.inference.request import Completion, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled
from bessemer.inference.statistics import EngineStatistics
from bessemer.model.decoder import Decoder
from bessemer.serving import config as limits
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller
from bessemer.tokenization.tokenizer import Tokenizer

#: What a refused client is told to wait, in seconds.
_RETRY_AFTER = 1


class TextEngine(SteppedEngine, Protocol):
    """The engine as the server uses it; `bessemer.inference.engine.Engine` is one."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together."""

    @property
    def longest(self) -> int:
        """The most tokens of prompt and completion together that the memory holds, at most the context."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that are computed at once."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times, between two steps."""

    @property
    def failure(self) -> BessemerError | None:
        """Why it can serve no more; None while it can."""

    @property
    def model(self) -> Decoder:
        """The model, whose norm and head read what was captured."""

    def prepare(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        capture: Capture | None = None,
    ) -> Request:
        """A request of token ids that has not begun; any thread may ask. RequestError for what is known to be wrong."""

    def close(self) -> None:
        """Give back what it holds."""

    def load_adapter(self, name: str, adapter: Path) -> None:
        """Let requests name the adapter in a folder. ArtefactError for a folder without one that fits the model."""

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. RequestError for one that is not loaded."""

    def embed(self, prompts: Sequence[list[int]], *, adapter: str | None = None) -> Tensor:
        """A vector of length 1 of each prompt, (N, D) float32; any thread may ask."""

    def completion(self, request: Request, params: SamplingParams) -> Completion:
        """The completion of a request that is done, as its parameters ask for it."""


class Worker:
    """Admission to an engine, and the requests that were admitted.

    As many completions as the engine computes at once are admitted, and `max_waiting` more; of one request fewer, so that it
    leaves places to others. An error reaches the requests that it concerns; once the engine's thread has ended by one, every
    request is refused with the reason.
    """

    def __init__(self, engine: TextEngine, max_waiting: int) -> None:
        self._engine = engine
        self._driver = StepDriver(engine)
        self._limit = engine.max_num_seqs + max_waiting
        #: The most completions of one request.
        self.most_at_once = self._limit - max_waiting // limits.OTHERS_SHARE
        #: API requests that were admitted and are not over.
        self.requests = 0
        #: Completions that they asked for.
        self.completions = 0
        #: Whether nothing new is begun, because the server is about to stop.
        self.is_draining = False

    @property
    def failure(self) -> Exception | None:
        """Why no request can be served any more; None while they can."""
        return self._engine.failure or self._driver.failure

    @contextlib.contextmanager
    def admit(self, completions: int) -> Generator[None, None, None]:
        """Admission for as long as the context lasts.

        Raises ApiError: 400 for more completions than are ever admitted at once, 503 when there is no place for them now or the
        server can serve no more.
        """
        if (failure := self.failure) is not None:
            raise ApiError(str(failure), status=503, kind="server_error")
        if self.is_draining:
            raise _busy("the server is stopping; another one may answer")
        if completions > self.most_at_once:
            raise ApiError(
                f"the request asks for {completions:,} completions, and this server computes at most {self.most_at_once:,} of "
                "one request; ask for fewer at once"
            )
        if self.completions + completions > self._limit:
            raise _busy(f"the server is busy with {self.requests} requests; try again in a moment")
        self.requests += 1
        self.completions += completions
        try:
            yield
        finally:
            self.requests -= 1
            self.completions -= completions

    async def chunks(self, requests: Sequence[Request], caller: Caller) -> AsyncGenerator[list[ChoiceChunk], None]:
        """Chunks of prepared requests and their siblings, as they come; of several steps at once where the client is slow.

        The tokens are counted for `caller`, and an admission is held meanwhile. Nothing is begun before the first item is asked
        for; closing or cancelling it ends the requests. Raises a request's own BessemerError, or ApiError.
        """
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            async with contextlib.aclosing(self._driver.chunks(requests)) as news:
                async for chunks in news:
                    caller.spend(completion=sum(len(one.chunk.token_ids) for one in chunks))
                    yield chunks

    async def complete(self, requests: Sequence[Request], params: SamplingParams, caller: Caller) -> list[Completion]:
        """The completions of prepared requests and their siblings, one with its `others` for each request. Cancelling it ends
        them. Counts and raises as `chunks`."""
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            await self._driver.finish(requests)
        completions = [self._engine.completion(request, params) for request in requests]
        caller.spend(completion=sum(one.completion_tokens for first in completions for one in (first, *first.others)))
        return completions

    def close(self) -> None:
        """End all in-flight requests, and the thread after the step it is in."""
        self._driver.close(ApiError("the server is stopping", status=503, kind="server_error"))

    @contextlib.contextmanager
    def _api_errors(self) -> Generator[None, None, None]:
        """Tell a client what it may know: a fault of ours is shown in full only in the log."""
        try:
            yield
        except ApiError:
            raise
        except Exception as error:
            if error is self._driver.failure:
                raise ApiError(str(error), status=503, kind="server_error") from None
            if isinstance(error, BessemerError):
                raise
            raise ApiError("the server failed; its log says why", status=500, kind="server_error") from None


def _busy(reason: str) -> ApiError:
    return ApiError(
        reason, status=503, kind="server_error", code="server_overloaded", headers={"Retry-After": str(_RETRY_AFTER)}
    )


#: Makes a request of a prompt and its settings that has not begun.
Prepare = Callable[[Sequence[int], SamplingParams], Request]


class ChoiceEvents(NamedTuple):
    """What a step adds to one of several answers: events of its turn, the tokens that were sampled with their
    log-probabilities, where these were asked for, and the ids of all of them."""

    choice: int
    events: Sequence[Event]
    sampled: Sequence[Sampled]
    token_ids: Sequence[int] = ()


@dataclass
class _Withheld:
    """Tokens of a message that a hook has not let pass: they, and how likely they were, are the text in another form."""

    sampled: list[Sampled] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Turns:
    """Turns that answer one conversation, and what they need of the engine.

    They go on in rounds: in the first one request makes all answers, so that the prompt is read once; the turns that then need
    another completion, behind a thinking budget or the results of tools, share the next round.
    """

    def __init__(self, turns: Sequence[Turn], prepare: Prepare, caller: Caller) -> None:
        """turns: have begun, all with the same prompt. caller: whose tokens they use. Raises RequestError where the engine
        refuses the prompt."""
        self._turns = turns
        self._prepare = prepare
        self._caller = caller
        first = turns[0].generation
        assert first is not None, "a turn that has begun needs a completion"
        self.prompt_ids = list(first.token_ids)
        #: Requests of the round, and of each of their completions the turn and the generation that it is for.
        self._requests = [prepare(first.token_ids, first.params.with_changes(n=len(turns)))]
        self._first = self._requests[0]
        self._owners = self._owners_of(range(len(turns)))
        self._withheld = [_Withheld() for _ in turns]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self._first.cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled in all turns that are over."""
        return sum(turn.end.completion_tokens for turn in self._turns if turn.end is not None)

    async def stream(self, worker: Worker) -> AsyncGenerator[list[ChoiceEvents], None]:
        """Events as they come, to the end of all turns. Closing or cancelling it ends the requests. Raises as `Worker`."""
        while self._requests:
            async with aclosing(worker.chunks(self._requests, self._caller)) as news:
                async for chunks in news:
                    told = []
                    for place, chunk in chunks:
                        choice, generation = self._owners[place]
                        turn = self._turns[choice]
                        # a turn that a hook sent back has no use for the rest
                        if turn.generation is generation:
                            told.append(self._taken(choice, chunk.token_ids, chunk.finish_reason, chunk.log_probs or ()))
                    if told:
                        yield told
                    if all(self._turns[choice].generation is not generation for choice, generation in self._owners):
                        break
            if told := await self._go_on():
                yield told

    async def finish(self, worker: Worker) -> list[ChoiceEvents]:
        """All events, without waiting for every token. Raises as `Worker.chunks`."""
        told = []
        while self._requests:
            params = [generation.params for _, generation in self._owners]
            shared = params[0].with_changes(n=len(self._owners) // len(self._requests))
            whole = await worker.complete(self._requests, shared, self._caller)
            completions = [one for first in whole for one in (first, *first.others)]
            for (choice, generation), completion in zip(self._owners, completions, strict=True):
                assert self._turns[choice].generation is generation
                sampled = completion.log_probs or ()
                told.append(self._taken(choice, completion.token_ids, completion.finish_reason, sampled))
            told += await self._go_on()
        return told

    def _taken(
        self, choice: int, token_ids: Sequence[int], finish_reason: str | None, sampled: Sequence[Sampled]
    ) -> ChoiceEvents:
        """Give a turn what was sampled for it. Where a hook holds back, the tokens are told with the text that they are, and
        those of a message that is sent back never."""
        turn, withheld = self._turns[choice], self._withheld[choice]
        before = turn.sent_back
        events = turn.take(Delta(token_ids, finish_reason=finish_reason))
        if turn.sent_back > before:
            self._withheld[choice] = _Withheld()
            return ChoiceEvents(choice, events, ())
        if not turn.holds_back:
            return ChoiceEvents(choice, events, sampled, token_ids)
        withheld.sampled += sampled
        withheld.token_ids += token_ids
        if not events:
            return ChoiceEvents(choice, events, ())
        self._withheld[choice] = _Withheld()
        return ChoiceEvents(choice, events, withheld.sampled, withheld.token_ids)

    async def _go_on(self) -> list[ChoiceEvents]:
        """Run the tools of this machine that were called, and prepare the requests of the next round; what the tools gave."""
        told, choices = [], []
        for choice, turn in enumerate(self._turns):
            while turn.wants_tools:
                told.append(ChoiceEvents(choice, await asyncio.to_thread(turn.run_tools), ()))
            if turn.end is None:
                choices.append(choice)
        self._owners = self._owners_of(choices)
        self._requests = [self._prepare(generation.token_ids, generation.params) for _, generation in self._owners]
        return told

    def _owners_of(self, choices: Sequence[int]) -> list[tuple[int, Generation]]:
        found = []
        for choice in choices:
            generation = self._turns[choice].generation
            assert generation is not None, "a turn that is not over needs a completion"
            found.append((choice, generation))
        return found
