"""`/v1/responses` as a WebSocket: a message asks for a response, whose events come as messages, one response after the other.

The last response stays with its connection, stored or not, so the next one may follow it; another one is found where it was
stored. One that fails takes the response that it was to follow away from the connection.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from fastapi import WebSocket

from bessemer.core.errors import BessemerError
from bessemer.serving.config import SOCKET_IDLE, WRITE_WAIT
from bessemer.serving.responses.protocol import SocketRequest
from bessemer.serving.responses.replies import SocketReply
from bessemer.serving.responses.service import ResponseService
from bessemer.serving.responses.store import StoredResponse
from bessemer.serving.runtime.bodies import ApiError, read_request
from bessemer.serving.runtime.clients import SCOPE, Caller
from bessemer.serving.runtime.streams import as_api_error, stream_events

#: Why a WebSocket ends (RFC 6455, section 7.4.1).
_GOING_AWAY = 1001


class ResponseSocket:
    """One connection. Its client's key is checked before, and each response counts as a request."""

    def __init__(self, service: ResponseService, socket: WebSocket) -> None:
        self._service = service
        self._socket = socket
        self._client = socket.scope[SCOPE].client
        #: The last response by its id.
        self._last: dict[str, StoredResponse] = {}
        self._waiting: asyncio.Queue[str] = asyncio.Queue(maxsize=1)

    async def run(self) -> None:
        """Serve the connection to its end: the client leaves, is silent for too long, does not read, or loses its key."""
        await self._socket.accept()
        ends = [asyncio.create_task(self._read()), asyncio.create_task(self._client.revoked.wait())]
        try:
            while (text := await self._before(ends, self._waiting.get(), SOCKET_IDLE.most)) is not None:
                if await self._before(ends, self._answer(text)) is None:
                    break
        finally:
            for task in ends:
                task.cancel()
            with suppress(RuntimeError, OSError):
                await self._socket.close(_GOING_AWAY)

    async def _before(self, ends: list[asyncio.Task[Any]], work: Any, seconds: float | None = None) -> Any:
        """The result of `work`, or None where the connection ends first, which cancels it."""
        working = asyncio.ensure_future(work)
        await asyncio.wait({working, *ends}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not any(task.done() for task in ends):
            return working.result()
        working.cancel()
        with suppress(asyncio.CancelledError, TimeoutError):
            await working
        return None

    async def _read(self) -> None:
        """Take messages, one ahead of the response that is made. Ends with the connection, and for a client that sends more."""
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            if text is None or self._waiting.full():
                return
            self._waiting.put_nowait(text)

    async def _answer(self, text: str) -> bool:
        """Make one response. True, also for one that failed."""
        caller = Caller(self._client)
        followed: str | None = None
        try:
            self._client.take_request()
            body = await asyncio.to_thread(read_request, SocketRequest, text.encode())
            followed = body.previous_response_id
            if not await self._respond(body, caller):
                self._last.pop(followed or "", None)
        except (ApiError, BessemerError) as error:
            self._last.pop(followed or "", None)
            refusal = as_api_error(error)
            told = {"type": "error", "sequence_number": 0, "status": refusal.status, **refusal.body()}
            await self._send(json.dumps(told))
        finally:
            caller.held.close()
        return True

    async def _respond(self, body: SocketRequest, caller: Caller) -> bool:
        """Send a response's events; whether it did not fail. Raises ApiError before its first event."""
        kept = self._last.get(body.previous_response_id or "")
        previous = await self._service.previous(body.previous_response_id, caller) if kept is None else kept.messages
        stored: StoredResponse | None = None
        with ExitStack() as admission:
            reply, turns = await self._service.begin(body, previous, caller, admission, SocketReply, is_probe=not body.generate)

            async def store() -> None:
                nonlocal stored
                stored = await self._service.keep(reply, body, previous, caller) or stored

            if turns is None:
                lines = reply.start() + reply.complete_probe()
                await store()
                await self._send(*lines.splitlines())
            else:
                async with aclosing(stream_events(turns, reply, admission.pop_all(), store)) as parts:
                    async for part in parts:
                        await self._send(*part.splitlines())
        if stored is not None:
            self._last = {reply.identity: stored}
        return stored is not None

    async def _send(self, *messages: str) -> None:
        """Send messages. Raises TimeoutError for a client that does not read."""
        for message in messages:
            async with asyncio.timeout(WRITE_WAIT.most):
                await self._socket.send_text(message)
