"""Results that come later: a client sends a request, gets an id at once, and asks for the result until it is ready.

Requests of one training run are computed in the order of the client's numbers, in whichever order they arrive; several runs
take turns on one thread. A request that is sent again with the same number is not computed again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bessemer.core.errors import BessemerError, failed_allocation
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.tinker.config import ANSWER_SECONDS, KEPT_ANSWERS, KEPT_BYTES, MOST_WAITING

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a client gets: a JSON object, or bytes of a message."""

    value: dict[str, Any] | bytes

    @property
    def size(self) -> int:
        return len(self.value) if isinstance(self.value, bytes) else 256


@dataclass(eq=False)
class PendingAnswer:
    """A request in progress or finished. owner: id of its client. may_end: whether the client may cancel it; a request of a run
    keeps its turn, since later ones wait for it."""

    id: str
    owner: str
    task: asyncio.Task[Answer]
    may_end: bool = False


class Answers:
    """All requests in progress, and the latest results. Used on one event loop."""

    def __init__(self) -> None:
        self._pending: OrderedDict[str, PendingAnswer] = OrderedDict()
        self._bytes = 0

    @property
    def under_way(self) -> int:
        return sum(not pending.task.done() for pending in self._pending.values())

    def begin(
        self, id: str, owner: str, work: Callable[[], Awaitable[dict[str, Any] | bytes]], *, may_end: bool = False
    ) -> str:
        """Begin a request, unless one of this id has begun; returns its id. Raises ApiError (404) for another client's."""
        known = self._pending.get(id)
        if known is not None:
            self._check_owner(known, owner)
            return id
        pending = PendingAnswer(id, owner, asyncio.create_task(_answer(work)), may_end)
        self._pending[id] = pending
        pending.task.add_done_callback(lambda task: self._finished(pending))
        return id

    async def answer(self, id: str, owner: str, seconds: float = ANSWER_SECONDS) -> Answer | None:
        """The result; None where it is not ready in time. Raises ApiError (410) for an unknown request, or one whose result was
        dropped."""
        pending = self._pending.get(id)
        if pending is None:
            raise ApiError(
                f"there is no request {id[:80]!r}: its answer was taken long ago, or the server was restarted", status=410
            )
        self._check_owner(pending, owner)
        await asyncio.wait((pending.task,), timeout=seconds)
        return pending.task.result() if pending.task.done() and not pending.task.cancelled() else None

    def cancel(self, id: str, owner: str) -> None:
        """Cancel a sampling request whose client has stopped waiting."""
        pending = self._pending.get(id)
        if pending is not None:
            self._check_owner(pending, owner)
            if pending.may_end:
                pending.task.cancel()

    def close(self) -> None:
        """End all requests."""
        for pending in self._pending.values():
            pending.task.cancel()

    def _check_owner(self, pending: PendingAnswer, owner: str) -> None:
        if pending.owner != owner:
            raise ApiError(f"there is no request {pending.id[:80]!r}", status=404)

    def _finished(self, pending: PendingAnswer) -> None:
        """Count a result, and drop the oldest ones above the limits."""
        if pending.task.cancelled():
            self._pending.pop(pending.id, None)
            return
        self._bytes += pending.task.result().size
        for id, oldest in list(self._pending.items()):
            if len(self._pending) <= KEPT_ANSWERS and self._bytes <= KEPT_BYTES:
                break
            if oldest.task.done() and oldest is not pending:
                del self._pending[id]
                self._bytes -= oldest.task.result().size


async def _answer(work: Callable[[], Awaitable[dict[str, Any] | bytes]]) -> Answer:
    """The result of `work`; an error of the client, or a failure, becomes a result too."""
    try:
        return Answer(await work())
    except (ApiError, BessemerError) as error:
        return Answer({"error": str(error), "category": "user"})
    except Exception as error:  # any failure becomes the client's result
        _log.error("a request failed", exc_info=error)
        if failed_allocation(error) is not None:
            reason = "the memory is full; send fewer or shorter examples at once, or start with less --micro-batch-tokens"
            return Answer({"error": reason, "category": "user"})
        return Answer({"error": "the server failed; its log says why", "category": "server"})


@dataclass(eq=False)
class Turns:
    """The requests of one training run, in the order of their numbers. next: the number that is computed next."""

    next: int = 1
    waiting: dict[int, asyncio.Event] = field(default_factory=dict)
    closed: bool = False

    async def wait(self, number: int) -> None:
        """Wait until it is the turn of request `number`. Raises ApiError where that has passed, or the run has ended."""
        if number < self.next:
            raise ApiError(f"seq_id {number} comes after {self.next - 1}; the run is past it")
        if len(self.waiting) >= MOST_WAITING:
            raise ApiError(f"{MOST_WAITING:,} requests of this run wait already; wait for their answers first")
        while number != self.next:
            await self.waiting.setdefault(number, asyncio.Event()).wait()
            self._check()
        self._check()

    def over(self) -> None:
        """Let the next request have its turn."""
        self.next += 1
        self.waiting.pop(self.next - 1, None)
        if (event := self.waiting.get(self.next)) is not None:
            event.set()

    def close(self) -> None:
        """Refuse the requests that wait."""
        self.closed = True
        for event in self.waiting.values():
            event.set()

    def _check(self) -> None:
        if self.closed:
            raise ApiError("this training run has ended; go on from its saved weights in a new one")


class TrainingThread:
    """The thread that computes all runs, one step at a time, in the order in which steps become due."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training")

    async def run(self, turns: Turns, number: int | None, work: Callable[[], Any]) -> Any:
        """Compute a request when it is its turn. number: None takes the next one."""
        number = turns.next + len(turns.waiting) if number is None else number
        await turns.wait(number)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            turns.over()

    async def run_now(self, work: Callable[[], Any]) -> Any:
        """Compute work that has no place in a run's order."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """End the thread after its step."""
        self._executor.shutdown(wait=False, cancel_futures=True)
