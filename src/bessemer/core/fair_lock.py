"""A lock that a thread which wants it again at once cannot keep from the others."""

from __future__ import annotations

import threading


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
