"""What the APIs share of a response: events by name, clients that leave, and errors that are not the API's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Send

from bessemer.core.errors import BessemerError, LostProcessError
from bessemer.serving.runtime.bodies import ApiError

#: nginx's status for a client that left before its response; it is never received.
CLIENT_LEFT = 499
#: An event with its name.
NamedEvent = tuple[str, dict[str, Any]]
#: Seconds of silence after which a stream says that it is still there: a prompt may be read for minutes, and proxies and
#: clients close what is silent for less.
QUIET_SECONDS = 1.0


#: Characters that JSON leaves as they are, and at which Python's clients break lines (`str.splitlines`).
_LINE_BREAKS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})


def event_data(body: dict[str, Any]) -> str:
    """A body in JSON that is one line whatever takes lines apart."""
    text = json.dumps(body, ensure_ascii=False)
    return text if text.isascii() else text.translate(_LINE_BREAKS)


async def named_events(
    news: AsyncGenerator[list[NamedEvent], None], failed: Callable[[ApiError], NamedEvent]
) -> AsyncIterator[str]:
    """The server-sent events of a stream, with their names. failed: the event that tells an error: the status is long sent."""

    def event(kind: str, body: dict[str, Any]) -> str:
        return f"event: {kind}\ndata: {event_data(body)}\n\n"

    async with aclosing(news):
        try:
            async for told in news:
                if told:
                    yield "".join(event(*one) for one in told)
        except (BessemerError, ApiError) as error:
            yield event(*failed(as_api_error(error)))


async def made_beside(make: Callable[[], dict[str, Any]], headers: Mapping[str, str]) -> Response:
    """The response with a body that takes long to make and to write: on a thread."""
    return await asyncio.to_thread(lambda: JSONResponse(make(), headers=dict(headers)))


class EventStream(StreamingResponse):
    """A stream of server-sent events, which no cache keeps and no proxy holds back."""

    def __init__(
        self, events: AsyncIterator[str], headers: Mapping[str, str] | None = None, still_there: str = ": still there\n\n"
    ) -> None:
        """headers: more of the response's. still_there: sent at every `QUIET_SECONDS` without an event; a comment, which
        clients skip."""
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**own, **(headers or {})})
        self._still_there = still_there.encode()
        self._is_quiet = True

    async def stream_response(self, send: Send) -> None:
        async def send_event(message: Message) -> None:
            self._is_quiet = False
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                speaking.cancel()
            await send(message)

        speaking = asyncio.create_task(self._speak(send))
        try:
            await super().stream_response(send_event)
        finally:
            speaking.cancel()
            # a client that has left is noticed by the stream itself
            with suppress(asyncio.CancelledError, OSError):
                await speaking

    async def _speak(self, send: Send) -> None:
        while True:
            self._is_quiet = True
            await asyncio.sleep(QUIET_SECONDS)
            if self._is_quiet:
                await send({"type": "http.response.body", "body": self._still_there, "more_body": True})


async def until_client_leaves(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, which is cancelled when the client disconnects first."""
    answering = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_LEFT)
    finally:
        answering.cancel()
        leaving.cancel()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error that the tokenizer or the engine raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LostProcessError):
        return ApiError(str(error), status=503, kind="server_error")
    return ApiError(str(error))
