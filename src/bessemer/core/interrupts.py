"""Ctrl-C and SIGTERM wait for a moment that can bear them: the end of a step, when the weights are whole and can be saved, or
the next look of a thread that waits for others."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_threads_left = threading.Event()


def leave_threads() -> None:
    """Say that a library's threads are left in the middle of their work, since the user does not want to wait for them."""
    _threads_left.set()


def are_threads_left() -> bool:
    """Whether the process must end without taking Python down: threads that come back from native code into an interpreter
    that is gone abort it, with noise."""
    return _threads_left.is_set()


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads Ctrl-C does not wait for: one may read a large file, or a slow server."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        leave_threads()
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


class DeferredInterrupts:
    """While entered, notes a first Ctrl-C or SIGTERM in `received` and lets the step finish; a second one acts at once.

    `deliver` passes a noted signal to the handler that was there before. Does nothing outside the main thread, where Python
    lets nobody handle signals.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def renew(self) -> None:
        """Take the signals back from a library that has set handlers of its own since: they never hear of one."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def deliver(self) -> None:
        """Raise the noted signal again: KeyboardInterrupt after Ctrl-C, the end of the process after SIGTERM or without one."""
        self._restore()
        signal.raise_signal(self.received or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
