"""Asynchronous generation: completions for event loops, and the thread that steps the engine for them.

The engine computes all requests together, so one thread is enough, and no event loop waits for a step. It runs while any of
their requests is in flight. Requests begin and are stopped between two steps. The chunks of a step go to each event loop in
one call, however many requests wait there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.images import chat_prompt
from bessemer.inference.request import Chunk, Completion, Prompt, Prompts, Request, check_streamed, completion_of, prompt_calls
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer

#: Seconds that `StepDriver.close` waits for the step under way.
_LAST_STEP_SECONDS = 5

#: Most chunks given to a reader at once: for a slow one thousands may wait, and each takes work.
_CHUNKS_AT_ONCE = 16

_log = logging.getLogger(__name__)


class SteppedEngine(Protocol):
    """What a driver needs of an engine; other threads may step it too."""

    def begin(self, request: Request) -> None:
        """Let a request take part in the steps."""

    def step(self) -> None:
        """Compute the next step of all in-flight requests."""

    def stop(self, request: Request) -> None:
        """End a request and its siblings, in any state; what they hold is free."""


class ChoiceChunk(NamedTuple):
    """A chunk of one of several completions: `choice` counts requests, each followed by its siblings, from 0."""

    choice: int
    chunk: Chunk


@dataclass(eq=False)
class _Reader:
    """A coroutine that waits for requests: for every chunk of them, or until all are done."""

    requests: Sequence[Request]
    wants_chunks: bool
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    over: bool = False

    def __post_init__(self) -> None:
        self.completions = [each for request in self.requests for each in (request, *request.siblings)]

    @property
    def has_chunks(self) -> bool:
        return any(each.chunks for each in self.completions)

    def take_chunks(self) -> list[ChoiceChunk]:
        """At most `_CHUNKS_AT_ONCE` of the waiting chunks. The thread may add others meanwhile."""
        waiting = (
            ChoiceChunk(choice, each.chunks.popleft())
            for choice, each in enumerate(self.completions)
            for _ in range(len(each.chunks))
        )
        return list(islice(waiting, _CHUNKS_AT_ONCE))

    def raise_error(self) -> None:
        if self.error is not None:
            # each of several readers of one error gets a fresh traceback
            raise self.error.with_traceback(None)


class StepDriver:
    """The thread that steps an engine for event loops. It starts with the first request, and ends with the last.

    An error of a request reaches its reader alone, and one of a step all readers; then the thread goes on. An engine may own
    its driver: only the running thread holds the engine.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = weakref.ref(engine)
        #: Why no request is served any more; None while they are.
        self.failure: Exception | None = None
        # reentrant: a coroutine that is collected while its thread is in here leaves too
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._joining: list[_Reader] = []
        self._leaving: list[_Reader] = []
        # the thread's own
        self._in_flight: dict[_Reader, None] = {}

    async def chunks(self, requests: Sequence[Request]) -> AsyncGenerator[list[ChoiceChunk], None]:
        """Begin prepared requests; their chunks and their siblings' as they come, of several steps at once for a slow reader.

        To close or cancel it stops the requests before the next step, and so does an error of one. Raises that error, what a
        step raised, or `failure`.
        """
        reader = _Reader(requests, wants_chunks=True)
        unfinished = len(reader.completions)
        with self._serving(reader):
            while unfinished:
                await reader.arrived.wait()
                reader.arrived.clear()
                while chunks := reader.take_chunks():
                    unfinished -= sum(one.chunk.finish_reason is not None for one in chunks)
                    yield chunks
                    # sending them may never wait: this gives others on the event loop their turn
                    await asyncio.sleep(0)
                if unfinished:
                    reader.raise_error()

    async def finish(self, requests: Sequence[Request]) -> None:
        """Begin prepared requests; return when they and their siblings are done. Cancelling stops them; raises as `chunks`."""
        reader = _Reader(requests, wants_chunks=False)
        with self._serving(reader):
            await reader.arrived.wait()
        reader.raise_error()

    def close(self, reason: Exception) -> None:
        """End all in-flight requests with this error, and refuse others with it; the thread ends after its step."""
        with self._lock:
            self.failure = self.failure or reason
            thread = self._thread
        if thread is not None:
            thread.join(_LAST_STEP_SECONDS)

    # -- on an event loop

    @contextlib.contextmanager
    def _serving(self, reader: _Reader) -> Generator[None, None, None]:
        self._join(reader)
        try:
            yield
        finally:
            with self._lock:
                if self._thread is not None and not reader.over:
                    self._leaving.append(reader)

    def _join(self, reader: _Reader) -> None:
        with self._lock:
            if self.failure is not None:
                raise self.failure.with_traceback(None)
            self._joining.append(reader)
            if self._thread is None:
                engine = self._engine()
                assert engine is not None, "the caller holds the engine"
                # a daemon: a program that ends while an event loop is stopped does not wait for its requests
                self._thread = threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True)
                self._thread.start()

    # -- on the thread

    def _run(self, engine: SteppedEngine) -> None:
        try:
            while self._exchange_readers(engine):
                if self._in_flight:
                    self._step(engine)
        except BaseException as error:
            # an internal error: no request may wait for a thread that has ended
            _log.critical("the engine's thread ended", exc_info=error)
            with self._lock:
                self._thread = None
                self.failure = BessemerError("the engine has ended; start it again, its log says why")
                joining, self._joining = self._joining, []
                self._in_flight.update(dict.fromkeys(joining))
            self._drop_all(engine, self.failure)

    def _exchange_readers(self, engine: SteppedEngine) -> bool:
        """Stop requests of readers that have left, and begin those of new ones. False where the thread ends instead."""
        with self._lock:
            joining, self._joining = self._joining, []
            leaving, self._leaving = self._leaving, []
            self._in_flight.update(dict.fromkeys(joining))
            failure = self.failure
            ends = failure is not None or not self._in_flight
            if ends:
                self._thread = None
        if failure is not None:
            self._drop_all(engine, failure)
        if ends:
            return False
        for reader in leaving:
            self._stop(engine, reader)
        for reader in joining:
            # some have left already
            if reader in self._in_flight:
                self._begin(engine, reader)
        return True

    def _begin(self, engine: SteppedEngine, reader: _Reader) -> None:
        try:
            for request in reader.requests:
                engine.begin(request)
        except Exception as error:
            _log_fault(error)
            reader.error = error
            self._stop(engine, reader)
            _wake([reader])

    def _step(self, engine: SteppedEngine) -> None:
        try:
            engine.step()
        except Exception as error:
            _log_fault(error)
            self._drop_all(engine, error)
        else:
            _wake([reader for reader in list(self._in_flight) if self._needs_waking(engine, reader)])

    def _needs_waking(self, engine: SteppedEngine, reader: _Reader) -> bool:
        """Whether a reader is woken after a step. One whose requests are done, or of which one failed, leaves."""
        reader.error = next((each.error for each in reader.completions if each.error is not None), None)
        if reader.error is not None or reader.loop.is_closed():
            self._stop(engine, reader)
        elif all(each.done for each in reader.completions):
            reader.over = True
            del self._in_flight[reader]
        return reader.over or (reader.wants_chunks and reader.has_chunks)

    def _drop_all(self, engine: SteppedEngine, error: Exception) -> None:
        readers = list(self._in_flight)
        for reader in readers:
            reader.error = error
        _wake(readers)
        for reader in readers:
            self._stop(engine, reader)

    def _stop(self, engine: SteppedEngine, reader: _Reader) -> None:
        """End a reader's requests, where they are in flight; the log says so where the engine cannot."""
        if reader not in self._in_flight:
            return
        del self._in_flight[reader]
        reader.over = True
        for request in reader.requests:
            try:
                engine.stop(request)
            except Exception as error:
                _log_fault(error)


def _log_fault(error: Exception) -> None:
    """Log an internal error: its reader may be gone."""
    if not isinstance(error, BessemerError):
        _log.error("the engine failed", exc_info=error)


def _wake(readers: Sequence[_Reader]) -> None:
    """Wake readers, in one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Reader]] = {}
    for reader in readers:
        by_loop.setdefault(reader.loop, []).append(reader)
    for loop, mine in by_loop.items():
        # a loop that is closed has no coroutine that waits
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_arrive, mine)


def _arrive(readers: Sequence[_Reader]) -> None:
    for reader in readers:
        reader.arrived.set()


class AsyncGeneration(ABC):
    """`agenerate`, `astream` and `astream_chat`, for an engine that prepares requests and has a driver.

    Requests of any number of event loops, each in a thread of its own, share steps with each other and with callers that use
    no event loop. A thread steps while any of them is in flight; no event loop waits for a step. A slow reader finds its chunks
    waiting, and holds up no other. Requests stop when their task is cancelled, their generator is closed or their event loop is
    closed: their blocks are free after the step under way.
    """

    tokenizer: Tokenizer
    _driver: StepDriver

    @property
    @abstractmethod
    def default_params(self) -> SamplingParams:
        """Parameters of a call that names none."""

    @abstractmethod
    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """A request that has not begun. Any thread may ask for it."""

    async def agenerate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[Completion]:
        """As `generate`. Raises RequestError for beam search too, which has no asynchronous form."""
        calls = prompt_calls(prompts, self.default_params if params is None else params, adapter)
        if any(call.params.beam_width for call in calls):
            raise RequestError("beam search has no asynchronous form: leave out beam_width, or call generate on another thread")

        def prepare_all() -> list[Request]:
            return [
                self.prepare(call.prompt, call.params, priority=priority, adapter=call.adapter, cache_salt=cache_salt)
                for call in calls
            ]

        requests = await asyncio.to_thread(prepare_all)
        await self._driver.finish(requests)
        return [completion_of(request, call.params) for request, call in zip(requests, calls, strict=True)]

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `stream`. Nothing begins before the first is awaited.

        Raises RequestError at once for more than one completion, and at the first chunk for a prompt that does not fit or an
        unknown adapter: the prompt is read on another thread.
        """
        params = self.default_params if params is None else params
        check_streamed(params)
        return self._chunks(partial(self.prepare, prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt))

    def astream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `stream_chat`. Raises as `astream`, and for a malformed message or tool as for a prompt."""
        params = self.default_params if params is None else params
        check_streamed(params)

        def prepare() -> Request:
            prompt = chat_prompt(self.tokenizer, messages, tools)
            return self.prepare(prompt, params, adapter=adapter, cache_salt=cache_salt)

        return self._chunks(prepare)

    async def _chunks(self, prepare: Callable[[], Request]) -> AsyncGenerator[Chunk, None]:
        request = await asyncio.to_thread(prepare)
        async with aclosing(self._driver.chunks([request])) as arrivals:
            async for chunks in arrivals:
                for _, chunk in chunks:
                    yield chunk
