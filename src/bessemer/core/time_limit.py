"""A call that ends after a time, whatever it does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

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
