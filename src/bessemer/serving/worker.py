"""The engine's thread: it steps the engine while any request is in flight, and sleeps otherwise.

The engine computes all requests together, so one thread is enough, and the event loop never waits for it. Commands to the
engine (begin a request, stop one whose client has left) are executed between two steps. The results of a step go to the event
loop in one call, however many clients there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bessemer.core.errors import BessemerError
from bessemer.inference.request import Chunk, Completion, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.bodies import ApiError
from bessemer.tokenization.tokenizer import Tokenizer

#: What a refused client is told to wait, in seconds.
_RETRY_AFTER = 1
#: Seconds that a stop waits for the step in flight.
_LAST_STEP_SECONDS = 5

_log = logging.getLogger(__name__)


class TextEngine(Protocol):
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
    def failure(self) -> BessemerError | None:
        """Why it can serve no more; None while it can."""

    def prepare(
        self, prompt: list[int], params: SamplingParams, *, adapter: str | None = None, cache_salt: str | None = None
    ) -> Request:
        """A request of token ids that has not begun; any thread may ask. RequestError for what is known to be wrong."""

    def begin(self, request: Request) -> None:
        """Let a request take part in the steps."""

    def step(self) -> None:
        """Compute the next step of all in-flight requests."""

    def stop(self, request: Request) -> None:
        """End a request and its siblings, in any state; what they hold is free."""

    def completion(self, request: Request, params: SamplingParams) -> Completion:
        """The completion of a request that is done, as its parameters ask for it."""


class ChoiceChunk(NamedTuple):
    """What one step adds to a choice of an API request."""

    choice: int
    chunk: Chunk


#: What a client's coroutine gets: chunks of a stream, the whole completion, the end of a stream (None), or an error.
_News = list[ChoiceChunk] | Completion | Exception | None


@dataclass(eq=False)
class _Order:
    """An API request in flight: the thread's side is its engine request, the event loop's what has come and was not taken."""

    request: Request
    params: SamplingParams
    streamed: bool
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    chunks: list[ChoiceChunk] = field(default_factory=list)
    completion: Completion | None = None
    error: Exception | None = None
    over: bool = False
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def receive(self, news: _News) -> None:
        """Keep what came for the coroutine that waits, on the event loop."""
        if isinstance(news, list):
            self.chunks += news
        else:
            self.over = True
            if isinstance(news, Completion):
                self.completion = news
            else:
                self.error = news
        self.arrived.set()


class Worker:
    """The engine's thread, and admission to it.

    As many completions as the engine computes at once are admitted, and `max_waiting` more. An error reaches the requests that
    it concerns, and the thread goes on; once the thread has ended, every request is refused with the reason.
    """

    def __init__(self, engine: TextEngine, max_waiting: int) -> None:
        self._engine = engine
        self._limit = engine.max_num_seqs + max_waiting
        #: API requests that were admitted and are not over.
        self.requests = 0
        #: Completions that they asked for.
        self.completions = 0
        self._wake = threading.Condition()
        self._todo: deque[tuple[Callable[[_Order], None], _Order]] = deque()
        self._closed = False
        self._ended: Exception | None = None
        self._thread: threading.Thread | None = None
        # the thread's own
        self._in_flight: list[_Order] = []

    @property
    def failure(self) -> Exception | None:
        """Why no request can be served any more; None while they can."""
        return self._engine.failure or self._ended

    @contextlib.contextmanager
    def admit(self, completions: int) -> Generator[None, None, None]:
        """Admission for as long as the context lasts. Raises ApiError (503) when the server is full, or can serve no more."""
        if (failure := self.failure) is not None:
            raise ApiError(str(failure), status=503, kind="server_error")
        if self.completions >= self._limit:
            raise ApiError(
                f"the server is busy with {self.requests} requests; try again in a moment",
                status=503,
                kind="server_error",
                code="server_overloaded",
                headers={"Retry-After": str(_RETRY_AFTER)},
            )
        self.requests += 1
        self.completions += completions
        try:
            yield
        finally:
            self.requests -= 1
            self.completions -= completions

    async def stream(
        self, request: Request, params: SamplingParams, place: contextlib.AbstractContextManager
    ) -> AsyncGenerator[list[ChoiceChunk], None]:
        """Chunks of a prepared request and its siblings, as they come; of several steps at once where the client is slow.

        The first item is an empty list, given at once: until it is taken nothing is begun; afterwards closing or cancelling
        this generator ends the request and its admission. Raises the request's own BessemerError, or ApiError.
        """
        order = _Order(request, params, streamed=True)
        with place, self._serving(order):
            yield []
            while True:
                await order.arrived.wait()
                order.arrived.clear()
                chunks, order.chunks = order.chunks, []
                over, error = order.over, order.error
                if chunks:
                    yield chunks
                if error is not None:
                    raise error
                if over:
                    return

    async def complete(self, request: Request, params: SamplingParams) -> Completion:
        """The completion of a prepared request and its siblings. Cancelling it ends the request. Raises as `stream`."""
        order = _Order(request, params, streamed=False)
        with self._serving(order):
            await order.arrived.wait()
        if order.error is not None:
            raise order.error
        assert order.completion is not None
        return order.completion

    def close(self) -> None:
        """End all in-flight requests, and the thread after the step it is in."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(_LAST_STEP_SECONDS)

    # -- on the event loop

    @contextlib.contextmanager
    def _serving(self, order: _Order) -> Generator[None, None, None]:
        self._ask(self._begin, order)
        try:
            yield
        finally:
            self._ask(self._leave, order)

    def _ask(self, command: Callable[[_Order], None], order: _Order) -> None:
        """Let the thread execute a command before its next step."""
        with self._wake:
            if self._thread is None and not self._closed:
                # a daemon: a program that ends without `close` is not held up by an idle thread
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            if self._ended is None and self._thread is not None:
                self._todo.append((command, order))
                self._wake.notify()
                return
        order.receive(self._ended or _stopping())

    # -- on the thread

    def _work(self) -> None:
        ended: Exception = _stopping()
        try:
            self._serve_until_closed()
        except BaseException as error:
            # what no request can be blamed for: none may wait for a thread that is gone
            _log.critical("the engine's thread ended", exc_info=error)
            ended = ApiError("the engine has ended; start the server again, its log says why", status=503, kind="server_error")
        # nothing is asked of it from here on
        with self._wake:
            self._ended = ended
        self._in_flight += [order for command, order in self._todo if command == self._begin and order not in self._in_flight]
        self._drop_all(ended)

    def _serve_until_closed(self) -> None:
        while True:
            with self._wake:
                while not (self._todo or self._in_flight or self._closed):
                    self._wake.wait()
                if self._closed:
                    return
            while self._todo:
                command, order = self._todo[0]
                try:
                    command(order)
                except Exception as error:
                    _tell([(order, _reason(error))])
                # only now: until it is done, the end of the thread still finds the request
                self._todo.popleft()
            if self._in_flight:
                self._step()

    def _begin(self, order: _Order) -> None:
        self._engine.begin(order.request)
        self._in_flight.append(order)

    def _leave(self, order: _Order) -> None:
        if order in self._in_flight:
            self._in_flight.remove(order)
            self._engine.stop(order.request)

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            # a fault of ours: every request fails, and the next ones begin afresh
            self._drop_all(_reason(error))
            return
        told: list[tuple[_Order, _News]] = []
        for order in list(self._in_flight):
            try:
                self._look(order, told)
            except Exception as error:
                told.append((order, _reason(error)))
                self._stop(order)
        _tell(told)

    def _look(self, order: _Order, told: list[tuple[_Order, _News]]) -> None:
        """Collect what the step gave to a request."""
        requests = (order.request, *order.request.siblings)
        error = next((each.error for each in requests if each.error is not None), None)
        if error is not None:
            told.append((order, error))
            self._stop(order)
            return
        if order.streamed:
            chunks = [ChoiceChunk(choice, one) for choice, each in enumerate(requests) for one in each.drain()]
            if chunks:
                told.append((order, chunks))
        if all(each.done for each in requests):
            told.append((order, None if order.streamed else self._engine.completion(order.request, order.params)))
            self._in_flight.remove(order)

    def _stop(self, order: _Order) -> None:
        """Leave a request that is told why; where the engine cannot even stop it, the log says so."""
        try:
            self._leave(order)
        except Exception as error:
            _reason(error)

    def _drop_all(self, error: Exception) -> None:
        orders = list(self._in_flight)
        _tell([(order, error) for order in orders])
        for order in orders:
            self._stop(order)


def _stopping() -> ApiError:
    return ApiError("the server is stopping", status=503, kind="server_error")


def _reason(error: Exception) -> Exception:
    """The error that the client is told. A fault of ours is shown in full only in the log."""
    if isinstance(error, BessemerError):
        return error
    _log.error("the engine failed", exc_info=error)
    return ApiError("the server failed; its log says why", status=500, kind="server_error")


def _tell(told: list[tuple[_Order, _News]]) -> None:
    """Deliver results, in one call for each event loop."""
    for loop in {order.loop for order, _ in told}:
        mine = [(order, news) for order, news in told if order.loop is loop]
        # the loop is closed, and its coroutines are gone
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, mine)


def _deliver(told: list[tuple[_Order, _News]]) -> None:
    for order, news in told:
        order.receive(news)
