"""Signals, time limits, threads and locks.

Ctrl-C and SIGTERM are deferred to the end of a step, when the weights are whole and can be saved. `call_within` ends a call
after a time, `thread_pool` does not wait for its threads after Ctrl-C, and `FairLock` starves no thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

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


Value = TypeVar("Value")

#: Seconds after which a call that caught the first interruption gets the next.
_AGAIN = 0.5


class _TimeUp(BaseException):
    """No `except Exception` in the function catches it."""


def call_within(seconds: float, function: Callable[[], Value]) -> Value:
    """What a function returns. Raises TimeoutError when it takes longer, and what it raises.

    In the main thread the function is interrupted, regular expressions and waits included. Elsewhere, and where the system has
    no such timer, it runs in a thread of its own, which is left behind when the time is up.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return _in_thread(seconds, function)
    armed = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise _TimeUp

    before = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        try:
            return function()
        finally:
            armed = False
    except _TimeUp:
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if timer[0]:
            signal.setitimer(signal.ITIMER_REAL, *timer)


def _in_thread(seconds: float, function: Callable[[], Value]) -> Value:
    values: list[Value] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            values.append(function())
        except BaseException as error:  # anything a user's function may raise; raised again below
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"took longer than {seconds:g} s")
    if errors:
        raise errors[0]
    return values[0]


class FairLock:
    """A reentrant lock. A thread that releases it and asks again comes after those that waited meanwhile.

    `threading.RLock` gives no turns: a thread that releases it in a loop mostly takes it again before the others wake.
    """

    def __init__(self) -> None:
        # the next holder has `_next`, so that no later thread overtakes it. Both are reentrant: a generator that is
        # collected while a thread waits here is closed on that thread, and asks for the lock too
        self._lock = threading.RLock()
        self._next = threading.RLock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            self._lock.acquire()
        else:
            with self._next:
                self._lock.acquire()
        self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
        self._lock.release()
