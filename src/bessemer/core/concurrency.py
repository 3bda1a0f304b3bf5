"""Signals, time limits, threads and locks.

Ctrl-C and SIGTERM are deferred to the end of a step, when the weights are whole and can be saved. `call_within` ends a call
after a time, `thread_pool` does not wait for its threads after Ctrl-C, `DaemonThreads` are never waited for, and `FairLock`
starves no thread.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_threads_abandoned = threading.Event()


def abandon_threads() -> None:
    """Record that a library's threads are still at work and that the user does not wait for them."""
    _threads_abandoned.set()


def threads_abandoned() -> bool:
    """Whether the process must end by `os._exit`: a thread that returns from native code into a finalised interpreter aborts
    the process with an error message."""
    return _threads_abandoned.is_set()


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that Ctrl-C does not wait for: a thread may be reading a large file or from a slow server."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        abandon_threads()
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


class DeferredInterrupts:
    """While entered, notes a first Ctrl-C or SIGTERM in `received` and lets the step finish; a second one acts at once.

    `deliver` passes a noted signal to the previous handler. A signal that is ignored, as SIGINT by what a script runs in the
    background, stays so. Does nothing outside the main thread, where Python does not allow signal handlers.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def renew(self) -> None:
        """Install the handlers again after a library has replaced them by its own."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def deliver(self) -> NoReturn:
        """Raise the noted signal again: KeyboardInterrupt after Ctrl-C, the end of the process after SIGTERM or no signal."""
        self._restore()
        signal.raise_signal(self.received or signal.SIGTERM)
        # a handler may return, and what called this has stopped
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


Value = TypeVar("Value")

#: Seconds between interruptions, for a call that catches the first one.
_AGAIN = 0.5


class _TimeUp(BaseException):
    """The time is up. A BaseException, so that no `except Exception` in the function catches it."""


def call_within(seconds: float, function: Callable[[], Value]) -> Value:
    """The function's result. Raises TimeoutError after `seconds`, or what the function raises.

    In the main thread the function is interrupted, even inside a regular expression or a wait. In other threads, and on systems
    without `setitimer`, it runs in a thread of its own, which keeps running after a timeout.
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


class DaemonThreads:
    """Threads for calls that wait for other machines. The process ends without waiting for them.

    A call's result, or what it raises, is in its `Future`. Calls begin in the order in which they were given.
    """

    def __init__(self, threads: int, name: str = "waiting") -> None:
        """threads: how many at most; they begin as calls need them."""
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._most = threads
        self._name = name
        self._lock = threading.Lock()
        self._threads = 0
        #: Calls that wait or are under way.
        self._outstanding = 0
        self._closed = False

    def submit(self, call: Callable[[], Value]) -> Future[Value]:
        """Let a thread make a call."""
        future: Future[Value] = Future()
        with self._lock:
            assert not self._closed, "no call is given after the end"
            self._outstanding += 1
            if self._threads < min(self._most, self._outstanding):
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Begin no further call: those that wait are cancelled, those under way are left alone."""
        with self._lock:
            self._closed = True
            while True:
                try:
                    given = self._calls.get_nowait()
                except queue.Empty:
                    break
                if given is not None:
                    given[0].cancel()
            for _ in range(self._threads):
                self._calls.put(None)

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # handed to the thread that waits for the result
                    future.set_exception(error)
                else:
                    future.set_result(result)
            with self._lock:
                self._outstanding -= 1


class FairLock:
    """A reentrant lock whose waiting threads take turns.

    With `threading.RLock`, a thread that releases and takes it in a loop mostly gets it again before the others wake.
    """

    def __init__(self) -> None:
        # the next holder holds `_next`, so that no later thread overtakes it. Both locks are reentrant: a generator that is
        # garbage-collected while a thread waits here is closed on that thread, and takes the lock too
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
