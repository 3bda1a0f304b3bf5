"""Admission to one engine: its places for completions, and the queue of the requests that wait for some.

Call it from one event loop. Places are handed on in the order of arrival: no request overtakes the first that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from bessemer.serving.runtime.bodies import ApiError, overloaded
from bessemer.serving.runtime.clients import Caller
from bessemer.serving.runtime.streams import unless_left

#: Seconds after which a client that waited in vain may ask again.
RETRY_SECONDS = 10


class QueueLimits(NamedTuple):
    """The queue of requests that find no place. most: requests that wait in it, 0 for no queue; seconds: that one waits."""

    most: int = 0
    seconds: float = 0.0


#: What finds no place is refused.
NO_QUEUE = QueueLimits()


@dataclass(eq=False)
class _Waiting:
    """A request in the queue. turn: whether the places are its own; False where nobody gets any more."""

    completions: int
    turn: asyncio.Future[bool]


class Admission:
    """Places for as many completions at once, of which one request gets at most `most_at_once`."""

    def __init__(self, places: int, most_at_once: int, queue: QueueLimits = NO_QUEUE) -> None:
        self._places = places
        self.most_at_once = most_at_once
        self._limits = queue
        self._queue: deque[_Waiting] = deque()
        #: API requests, those in the queue included, and the completions that the admitted ones ask for.
        self.requests = self.completions = 0
        self._is_draining = False

    @property
    def failure(self) -> Exception | None:
        """Why no request can be served any more; None while they can."""
        return None

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is begun, because the server is about to stop."""
        return self._is_draining

    @is_draining.setter
    def is_draining(self, is_draining: bool) -> None:
        self._is_draining = is_draining
        while is_draining and self._queue:
            waiting = self._queue.popleft()
            if not waiting.turn.done():
                waiting.turn.set_result(False)

    @contextlib.contextmanager
    def admit(self, completions: int) -> Generator[None, None, None]:
        """Admission for as long as the context lasts, without a wait.

        Raises ApiError: 400 for more completions than one request may have, 503 while there is no place for them, the server
        stops, or the engine has failed.
        """
        self._check(completions)
        if self._queue or not self._fits(completions):
            raise overloaded(f"the server is busy with {self.requests} requests; try again in a moment")
        self.requests += 1
        self.completions += completions
        with self._held(completions):
            yield

    async def place(self, completions: int, caller: Caller) -> contextlib.AbstractContextManager[None]:
        """Admission for as long as the context lasts, which is entered at once; waits in the queue where there is no place.

        Raises ApiError: as `admit`, 503 only where too many wait already, or for as long as the queue's limits allow; and where
        the caller's client leaves.
        """
        self._check(completions)
        if len(self._queue) >= self._limits.most or (not self._queue and self._fits(completions)):
            return self.admit(completions)
        waiting = _Waiting(completions, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self.requests += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                await unless_left(caller.receive, _turn_of(waiting))
            # while it waited, the server may have begun to stop, or the engine failed
            self._check(completions)
        except BaseException as error:
            self._leave(waiting)
            if isinstance(error, TimeoutError):
                raise overloaded(
                    f"no place was free within {self._limits.seconds:g} s: the server is busy with {self.requests} requests; "
                    "try again later",
                    RETRY_SECONDS,
                ) from None
            raise
        return self._held(completions)

    # -- inside

    def _check(self, completions: int) -> None:
        """Raise ApiError where the completions get no place however long they wait."""
        if (failure := self.failure) is not None:
            raise ApiError(str(failure), status=503, kind="server_error")
        if self.is_draining:
            raise overloaded("the server is stopping; another one may answer")
        if completions > self.most_at_once:
            raise ApiError(
                f"the request asks for {completions:,} completions, and this server computes at most {self.most_at_once:,} of "
                "one request; ask for fewer at once"
            )

    def _fits(self, completions: int) -> bool:
        return self.completions + completions <= self._places

    @contextlib.contextmanager
    def _held(self, completions: int) -> Generator[None, None, None]:
        try:
            yield
        finally:
            self.requests -= 1
            self.completions -= completions
            self._hand_on()

    def _hand_on(self) -> None:
        """Give free places to those that wait longest."""
        while self._queue and (self._queue[0].turn.done() or self._fits(self._queue[0].completions)):
            first = self._queue.popleft()
            # a wait that was given up is done
            if not first.turn.done():
                self.completions += first.completions
                first.turn.set_result(True)

    def _leave(self, waiting: _Waiting) -> None:
        """Give up a wait, or places that were handed on at its end."""
        self.requests -= 1
        if waiting in self._queue:
            self._queue.remove(waiting)
        elif not waiting.turn.cancelled() and waiting.turn.done() and waiting.turn.result():
            self.completions -= waiting.completions
        self._hand_on()


async def _turn_of(waiting: _Waiting) -> bool:
    return await waiting.turn
