"""HTTP responses of all APIs: as one body, or as a stream (server-sent events, lines); and errors as the API's own."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack, aclosing, suppress
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Send

from bessemer.core.errors import BessemerError, LostProcessError
from bessemer.serving.runtime.bodies import ApiError, without_places

Result = TypeVar("Result")
#: nginx's status for a client that left before its response; it is never received.
CLIENT_LEFT = 499
#: Seconds of silence after which a stream sends a ping: reading a prompt may take minutes, and proxies close idle connections.
QUIET_SECONDS = 1.0
#: A comment, which clients skip.
PING = ": still there\n\n"
#: Characters that JSON leaves as they are, and at which Python's clients break lines (`str.splitlines`).
_LINE_BREAKS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})


class Work(Protocol):
    """In-flight completions of one HTTP request."""

    def stream(self) -> AsyncGenerator[Any, None]:
        """What one or more steps of the engine add. Closing or cancelling it ends the completions."""

    async def finish(self) -> Any:
        """The whole result."""


class Reply(ABC):
    """The response in one API's format. Texts are parts of a stream (server-sent events, lines), several joined, or ""."""

    #: Of a stream.
    media_type = "text/event-stream"

    @property
    def is_large(self) -> bool:
        """Whether the body takes long to make and to write."""
        return False

    def ends_long(self, step: Any, /) -> bool:
        """Whether the events of an item of `Work.stream` take long to make."""
        return False

    @abstractmethod
    def whole(self, result: Any, /) -> dict[str, Any]:
        """The body of a response that is not streamed. result: of `Work.finish`."""

    def start(self) -> str:
        """Events before the prompt is computed."""
        return ""

    @abstractmethod
    def events(self, step: Any, /) -> str:
        """Events of an item of `Work.stream`."""

    def end(self) -> str:
        """Events after the last step."""
        return ""

    def sign_of_life(self, quiet: int) -> str:
        """What a stream sends when nothing came for so many times `QUIET_SECONDS`.

        Bytes keep a connection open. Clients that parse events and have a timer of their own for these see no comment, and some
        no ping: where such a client is known, an event of another kind is due at times.
        """
        return PING

    @abstractmethod
    def failed(self, error: ApiError) -> str:
        """The event of an error: the status was sent long before."""


async def respond(
    request: Request,
    work: Work,
    reply: Reply,
    admission: ExitStack,
    headers: Mapping[str, str],
    *,
    is_streamed: bool,
    after_step: Callable[[], Awaitable[None]] | None = None,
) -> Response:
    """Answer with the result of `work`, in the format of `reply`.

    A stream takes over `admission`, and releases it when it ends. after_step: awaited before the events of a step
    are sent. `work` is cancelled when the client leaves.
    """
    if not is_streamed:
        whole = _whole(work, reply, headers, after_step)
        return await until_client_leaves(request.receive, whole) or client_left_response()
    events = stream_events(work, reply, admission.pop_all(), after_step)
    # from here on, the generator holds the admission
    await anext(events)
    return EventStream(events, headers, reply.sign_of_life, reply.media_type)


async def _whole(
    work: Work, reply: Reply, headers: Mapping[str, str], after_step: Callable[[], Awaitable[None]] | None
) -> Response:
    result = await work.finish()
    if reply.is_large:
        return await asyncio.to_thread(lambda: JSONResponse(reply.whole(result), headers=dict(headers)))
    body = reply.whole(result)
    if after_step is not None:
        await after_step()
    return JSONResponse(body, headers=dict(headers))


async def stream_events(
    work: Work, reply: Reply, admission: ExitStack, after_step: Callable[[], Awaitable[None]] | None = None
) -> AsyncGenerator[str, None]:
    """The parts of a stream. The first item is "", given at once: from then on, closing or cancelling the generator ends the
    requests and their admission."""
    try:
        with admission:
            yield ""
            if start := reply.start():
                yield start
            async with aclosing(work.stream()) as steps:
                async for step in steps:
                    text = await asyncio.to_thread(reply.events, step) if reply.ends_long(step) else reply.events(step)
                    if after_step is not None:
                        await after_step()
                    if text:
                        yield text
    except (BessemerError, ApiError) as error:
        yield reply.failed(as_api_error(error))
        return
    if end := reply.end():
        yield end


def server_sent_event(body: Mapping[str, Any], name: str = "") -> str:
    """An event with its name, where it has one. The JSON stays on one line, whatever a client takes for a line break."""
    text = json.dumps(body, ensure_ascii=False)
    data = text if text.isascii() else text.translate(_LINE_BREAKS)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


def named_events(events: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Several events, each a name and a body."""
    return "".join(server_sent_event(body, name) for name, body in events)


class EventStream(StreamingResponse):
    """A stream of server-sent events, which no cache keeps and no proxy holds back."""

    def __init__(
        self,
        events: AsyncIterable[str] | Iterable[str],
        headers: Mapping[str, str] | None = None,
        sign_of_life: Callable[[int], str] = lambda quiet: PING,
        media_type: str = Reply.media_type,
    ) -> None:
        """headers: added to the response's. sign_of_life: as of `Reply`."""
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type=media_type, headers={**own, **(headers or {})})
        self._sign_of_life = sign_of_life
        #: Times `QUIET_SECONDS` without an event.
        self._quiet = 0

    async def stream_response(self, send: Send) -> None:
        async def send_event(message: Message) -> None:
            self._quiet = 0
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                pinging.cancel()
            await send(message)

        pinging = asyncio.create_task(self._send_pings(send))
        try:
            await super().stream_response(send_event)
        finally:
            pinging.cancel()
            # the stream itself notices a client that has left
            with suppress(asyncio.CancelledError, OSError):
                await pinging

    async def _send_pings(self, send: Send) -> None:
        while True:
            self._quiet += 1
            await asyncio.sleep(QUIET_SECONDS)
            if self._quiet:
                await send({"type": "http.response.body", "body": self._sign_of_life(self._quiet).encode(), "more_body": True})


async def until_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None if the client disconnects first, which cancels it. The body must have been received."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


async def unless_left(receive: Receive | None, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is not None. Raises ApiError, and cancels it, where the client disconnects first. receive:
    None where nobody says so."""
    result = await (work if receive is None else until_client_leaves(receive, work))
    if result is None:
        raise ApiError("the client has left", status=CLIENT_LEFT)
    return result


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def client_left_response() -> Response:
    """Nobody receives it, but the ASGI server waits for a response."""
    return Response(status_code=CLIENT_LEFT)


def as_api_error(error: Exception) -> ApiError:
    """An error of the tokenizer or the engine, as a client is answered."""
    if isinstance(error, ApiError):
        return error
    status, kind = (503, "server_error") if isinstance(error, LostProcessError) else (400, "invalid_request_error")
    return ApiError(without_places(str(error)), status=status, kind=kind)
