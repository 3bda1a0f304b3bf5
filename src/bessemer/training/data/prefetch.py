"""Batches read ahead, so that a step does not wait for its data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from bessemer.training.data.batches import Batch


class Prefetcher:
    """Reads the batches of steps in their order in a thread of its own, a few ahead of who asks for them.

    What is read is the same as without it, since a batch is a pure function of its step. An error in reading is raised
    where the batch is asked for. Used as a context, whose end waits for the batch that is being read.
    """

    def __init__(self, read: Callable[[int], Batch], steps: range, *, ahead: int = 2, pin: bool = False) -> None:
        """read: gives the batch of a step. ahead: batches that wait at most. pin: keep them where a GPU fetches them from."""
        self._read, self._steps, self._pin = read, iter(steps), pin
        self._expected = iter(steps)
        self._room = threading.Semaphore(ahead)
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closed.set()
        self._room.release()
        self._thread.join()

    def batch(self, step: int) -> Batch:
        """The batch of the next step, which must be `step`. Raises what reading it raised."""
        expected = next(self._expected)
        assert step == expected, f"step {step} is asked for, and {expected} is next"
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        self._room.release()
        return found

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._room.acquire()
                if self._closed.is_set():
                    return
                batch = self._read(step)
                self._ready.put(batch.pinned() if self._pin else batch)
        except BaseException as error:  # whatever it is, who waits for the batch must hear of it
            self._ready.put(error)
