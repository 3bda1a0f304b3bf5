"""Connections that keep a server waiting: a client must send its request's head and read its answer in time, or is let go."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from bessemer.serving import limits

#: Seconds for the head of a request, from the first moment that one is waited for.
HEAD_SECONDS = float(limits.HEAD_WAIT.most)
#: Seconds in which a client must read `limits.LEAST_READ` bytes of what waits for it, or all of it.
WRITE_SECONDS = float(limits.WRITE_WAIT.most)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on the time that the head of a request takes, and on the time that an answer waits to be read.

    uvicorn waits forever for the first request of a connection, for the rest of a head that has begun, and for a client to
    read, whose requests hold their places meanwhile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # `pause_writing` is then called whenever anything waits to be read
        transport.set_write_buffer_limits(high=0)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        is_between = before is None or before.response_complete
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif is_between and self._head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _await_reader(self) -> None:
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_reader, self.transport.get_write_buffer_size())

    def _check_reader(self, waiting: int) -> None:
        """End a connection whose client has read too little since `waiting` bytes waited for it."""
        if waiting - self.transport.get_write_buffer_size() < limits.LEAST_READ:
            self._write_timer = None
            # to close it would wait for the rest to be read
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._let_go)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _let_go(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
