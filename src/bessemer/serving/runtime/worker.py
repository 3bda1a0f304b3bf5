"""The engine behind the APIs: admission, completions, and turns of chats.

A thread steps the engine while any request is in flight (`bessemer.inference.async_generation`); the event loop never waits for
a step. `Turns` are several answers to one conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.messages import BadCall, Called, Event, RolledBack, TextDelta
from bessemer.assistant.turn import Turn
from bessemer.core.errors import BessemerError
from bessemer.inference.async_generation import ChoiceChunk, StepDriver
from bessemer.inference.engine import Engine
from bessemer.inference.request import Completion, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled
from bessemer.serving.config import OTHERS_SHARE
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.runtime.admission import NO_QUEUE, Admission, QueueLimits
from bessemer.serving.runtime.bodies import ApiError, withdrawn, without_places
from bessemer.serving.runtime.clients import Caller


class Worker(Admission):
    """Admission to one engine, and the requests that were admitted.

    Admits as many completions as the engine computes at once, and `max_waiting` more; a single request gets fewer, so that
    others find a place. An error reaches the requests that it concerns. Once the engine's thread has failed, every request is
    refused with the reason.
    """

    def __init__(self, engine: Engine, max_waiting: int, queue: QueueLimits = NO_QUEUE) -> None:
        """queue: of requests that find none of these places."""
        places = engine.max_num_seqs + max_waiting
        super().__init__(places, places - max_waiting // OTHERS_SHARE, queue)
        self._engine = engine
        self._driver = StepDriver(engine)

    @property
    def failure(self) -> Exception | None:
        return self._engine.failure or self._driver.failure

    async def chunks(self, requests: Sequence[Request], caller: Caller) -> AsyncGenerator[list[ChoiceChunk], None]:
        """Chunks of admitted requests and their siblings as they come; those of several steps at once where the client is slow.

        Counts the tokens for `caller`. Begins when the first item is awaited; closing or cancelling it ends the requests.
        Raises a request's own BessemerError, or ApiError.
        """
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            async with aclosing(self._driver.chunks(requests)) as steps:
                async for chunks in steps:
                    caller.spend(completion=sum(len(choice.chunk.token_ids) for choice in chunks))
                    yield chunks

    async def complete(self, requests: Sequence[Request], params: SamplingParams, caller: Caller) -> list[Completion]:
        """The completions of admitted requests: one for each, its siblings as `others`. Cancelling it ends them. Counts and
        raises as `chunks`."""
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            await self._driver.finish(requests)
        completions = [self._engine.completion(request, params) for request in requests]
        caller.spend(completion=sum(each.completion_tokens for first in completions for each in (first, *first.others)))
        return completions

    def close(self) -> None:
        """End all in-flight requests, and the thread after its current step."""
        self._driver.close(ApiError("the server is stopping", status=503, kind="server_error"))

    @contextlib.contextmanager
    def _api_errors(self) -> Generator[None, None, None]:
        """Turn errors into the API's. A bug is shown in full only in the log."""
        try:
            yield
        except ApiError:
            raise
        except Exception as error:
            if error is self._driver.failure:
                raise ApiError(without_places(str(error)), status=503, kind="server_error") from None
            if isinstance(error, BessemerError):
                raise
            raise ApiError("the server failed; its log says why", status=500, kind="server_error") from None


#: Makes an engine request of token ids that has not begun.
Prepare = Callable[[Sequence[int], SamplingParams], Request]


class ChoiceEvents(NamedTuple):
    """What a step adds to one answer: events of its turn, the sampled tokens with their log-probabilities, where the request
    has them, and the ids of all sampled tokens."""

    choice: int
    events: Sequence[Event]
    sampled: Sequence[Sampled]
    token_ids: Sequence[int] = ()


def text_of(step: Iterable[ChoiceEvents]) -> str:
    """The text that a step adds to the only choice. Raises ApiError where a hook took the answer back."""
    parts: list[str] = []
    for _, events, *_ in step:
        for event in events:
            match event:
                case TextDelta(text) | BadCall(text):
                    parts.append(text)
                case RolledBack(reason):
                    raise withdrawn(reason)
    return "".join(parts)


@dataclass
class _Withheld:
    """Tokens of a message that a hook holds back."""

    sampled: list[Sampled] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Turns:
    """Turns that answer one conversation, and their engine requests.

    They go on in rounds. In the first round one request makes all answers, so that the prompt is computed once. Turns that need
    another completion, after a thinking budget or the results of tools, share the next round.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        prepare: Prepare,
        caller: Caller,
        worker: Worker,
        sources: Sequence[ServedHit] | None = None,
        begun: Sequence[Sequence[Event]] = (),
    ) -> None:
        """turns: begun, with the same prompt. caller: whose tokens they use. sources: those in the prompt; None: of a chat
        without retrieval. begun: the events of each turn's beginning, of those that hooks refuse. Raises RequestError where the
        engine refuses the prompt."""
        self.sources = sources
        #: Tokens of the conversation, and of what the model reads, where summaries stand in it; None where there are none.
        self.summarised: dict[str, int] | None = None
        self._turns = turns
        self._prepare = prepare
        self._caller = caller
        self._worker = worker
        #: Events that are given out before the first completion.
        self._begun = [ChoiceEvents(choice, events, ()) for choice, events in enumerate(begun) if events]
        choices = [choice for choice, turn in enumerate(turns) if turn.end is None]
        self._owners = self._owners_of(choices)
        #: Engine requests of this round, and the choice and generation of each of their completions.
        self._requests: list[Request] = []
        self.prompt_ids: list[int] = []
        if choices:
            _, first = self._owners[0]
            self.prompt_ids = list(first.token_ids)
            self._requests = [prepare(first.token_ids, first.params.with_changes(n=len(choices)))]
        self._first = self._requests[0] if choices else None
        self._withheld = [_Withheld() for _ in turns]

    @property
    def prompt_tokens(self) -> int:
        # a picture is one token of a conversation, and many of the prompt
        first = self._first
        return len(self.prompt_ids) if first is None or first.images is None else first.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the prefix cache."""
        return 0 if self._first is None else self._first.cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled in all turns that are over."""
        return sum(turn.end.completion_tokens for turn in self._turns if turn.end is not None)

    async def stream(self) -> AsyncGenerator[list[ChoiceEvents], None]:
        """Events as they come, to the end of all turns. Closing or cancelling it ends the requests. Raises as `Worker`."""
        if self._begun:
            yield self._begun
        while self._requests:
            async with aclosing(self._worker.chunks(self._requests, self._caller)) as steps:
                async for chunks in steps:
                    step = []
                    for index, chunk in chunks:
                        choice, generation = self._owners[index]
                        # a message that a hook sent back needs no more of its tokens
                        if self._turns[choice].generation is generation:
                            taken = (choice, chunk.token_ids, chunk.finish_reason, chunk.log_probs or ())
                            takes_long = self._turns[choice].takes_long
                            step.append(await asyncio.to_thread(self._take, *taken) if takes_long else self._take(*taken))
                    if step:
                        yield step
                    if all(self._turns[choice].generation is not generation for choice, generation in self._owners):
                        break
            if step := await self._next_round():
                yield step

    async def finish(self) -> list[ChoiceEvents]:
        """All events, without waiting for every token. Raises as `Worker.chunks`."""
        step = [*self._begun]
        while self._requests:
            params = [generation.params for _, generation in self._owners]
            shared = params[0].with_changes(n=len(self._owners) // len(self._requests))
            firsts = await self._worker.complete(self._requests, shared, self._caller)
            completions = [completion for first in firsts for completion in (first, *first.others)]
            for (choice, generation), completion in zip(self._owners, completions, strict=True):
                assert self._turns[choice].generation is generation
                log_probs = completion.log_probs or ()
                taken = (choice, completion.token_ids, completion.finish_reason, log_probs)
                # a whole answer is read at once
                step.append(
                    await asyncio.to_thread(self._take, *taken) if self._turns[choice].holds_back else self._take(*taken)
                )
            step += await self._next_round()
        return step

    def _take(
        self, choice: int, token_ids: Sequence[int], finish_reason: str | None, sampled: Sequence[Sampled]
    ) -> ChoiceEvents:
        """Give a turn its new tokens. While a hook holds back, tokens come with the text that they make; those of a message
        that was sent back never come."""
        turn, withheld = self._turns[choice], self._withheld[choice]
        before = turn.sent_back
        # clients are not asked to run what the server runs
        events = [
            event
            for event in turn.take(Delta(token_ids, finish_reason=finish_reason))
            if not (isinstance(event, Called) and turn.is_run_here(event.call))
        ]
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

    async def _next_round(self) -> list[ChoiceEvents]:
        """Run the server's tools that were called, and prepare the next round's requests. Returns the events of the tools."""
        step, choices = [], []
        for choice, turn in enumerate(self._turns):
            while turn.wants_tools:
                step.append(ChoiceEvents(choice, await asyncio.to_thread(turn.run_tools), ()))
            if turn.end is None:
                choices.append(choice)
        self._owners = self._owners_of(choices)
        self._requests = [self._prepare(generation.token_ids, generation.params) for _, generation in self._owners]
        return step

    def _owners_of(self, choices: Sequence[int]) -> list[tuple[int, Generation]]:
        owners = []
        for choice in choices:
            generation = self._turns[choice].generation
            assert generation is not None, "a turn that is not over needs a completion"
            owners.append((choice, generation))
        return owners
