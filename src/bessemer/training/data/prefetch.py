"""Reading of batches: in a thread, so that a step does not wait for its data, or when they are requested."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from bessemer.training.data.batches import Batch


class Prefetcher:
    """Reads the batches of consecutive steps in a thread.

    The batches are the same as without it, since a batch is a pure function of its step. An error in reading is raised where
    the batch is requested. A context manager, whose exit waits for the batch that is being read.
    """

    def __init__(self, read: Callable[[int], Batch], steps: range, *, depth: int = 2, pin: bool = False) -> None:
        """read: the batch of a step. depth: most batches in the queue. pin: copy them to pinned memory."""
        self._read = read
        self._steps = iter(steps)
        self._pin = pin
        self._expected = iter(steps)
        self._free_slots = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closed.set()
        self._free_slots.release()
        self._thread.join()

    def batch(self, step: int) -> Batch:
        """The batch of the next step, which must be `step`. Raises what reading it raised."""
        expected = next(self._expected)
        assert step == expected, f"step {step} is requested, and {expected} is next"
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._free_slots.release()
        return item

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._free_slots.acquire()
                if self._closed.is_set():
                    return
                batch = self._read(step)
                self._ready.put(batch.pinned() if self._pin else batch)
        except BaseException as error:
            # of any kind: `batch` raises it in the training thread
            self._ready.put(error)


class ReadWhenNeeded:
    """Reads each batch when it is requested, in the training thread: for sources whose batches depend on the weights."""

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self._read = read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass

    def batch(self, step: int) -> Batch:
        """The batch of a step. Raises what reading it raised."""
        return self._read(step)
