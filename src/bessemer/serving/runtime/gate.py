"""The gate that every request passes before a route sees it: hosts, origins, keys, and the size and time of a body.

It works on ASGI's own messages and on the path of the scope, never on a URL that is built from what a client says.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bessemer.assistant.config import Principal
from bessemer.serving import config as limits
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import SCOPE, Caller, Client, Keys

#: Makes an error's body, in the form of the API that a path belongs to.
ErrorBody = Callable[[str, ApiError], dict[str, Any]]
#: What is answered without a key: a watcher of the server has none.
PUBLIC = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
_MIB = 2**20

#: The logger of a line for every request.
REQUEST_LOG = "bessemer.requests"
_log = logging.getLogger(REQUEST_LOG)


class Gate:
    """Middleware. Refuses a request that must not reach a route; leaves a `Caller` in the scope of the others.

    - Host: an address of numbers, `localhost`, or a name in `hosts`: a page whose name has been pointed at this machine (DNS
      rebinding) is turned away. `*` among them lets in every name.
    - Origin, of a page's script: this server's own, or one in `origins`, which alone are told that they may read the answer.
    - Key: of the client, for every path that is not public.
    """

    def __init__(
        self, app: ASGIApp, config: ServingConfig, keys: Keys | None, error_body: ErrorBody, public: Collection[str] = PUBLIC
    ) -> None:
        """public: paths that need no key."""
        self._app = app
        self._public = frozenset(public)
        self._config = config
        self._keys = keys
        self._error_body = error_body
        self._everybody = Client(Principal("anybody"))
        self._most_bytes = round(config.max_body * _MIB)
        self._bodies = _Bodies(limits.BODIES.most * _MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _Headers(scope["headers"])
        caller = Caller(self._everybody)
        reply = _Reply(send, caller, {})
        started = time.perf_counter()
        try:
            self._check_host(headers)
            reply.headers |= self._check_origin(headers)
            if _is_preflight(scope, headers):
                await reply.preflight(scope)
                return
            caller.client = self._client(scope["path"], headers)
            body = _BodyReader(receive, caller.client, self._most_bytes, self._config.body_seconds, self._bodies)
            body.check_announced(headers)
            scope[SCOPE] = caller
            try:
                await self._app(scope, body.receive, reply.send)
            finally:
                body.close()
        except ApiError as error:
            if reply.status is None:
                answer = JSONResponse(self._error_body(scope["path"], error), error.status, error.headers)
                await answer(scope, receive, reply.send)
        finally:
            caller.held.close()
            if self._config.request_log:
                _log.info(json.dumps(_log_line(scope, caller, reply.status, time.perf_counter() - started)))

    def _check_host(self, headers: _Headers) -> None:
        if (host := headers.one("host")) is None:
            raise ApiError("the request needs one Host header", code="invalid_host")
        if "*" not in self._config.hosts and not _is_trusted(_name_of(host), self._config.hosts):
            raise ApiError(
                "this server does not answer to that Host; it may be let in with --allow-host", status=403, code="invalid_host"
            )

    def _check_origin(self, headers: _Headers) -> dict[str, str]:
        """What an origin that is not the server's own is told."""
        if (origin := headers.first("origin")) is None:
            return {}
        if origin.lower() in self._config.origins:
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if origin.lower().partition("://")[2] == (headers.one("host") or "").lower():
            return {}
        raise ApiError(
            "pages of that Origin may not use this server; it may be let in with --allow-origin",
            status=403,
            code="invalid_origin",
        )

    def _client(self, path: str, headers: _Headers) -> Client:
        """The client that a request may be answered for. Raises ApiError (401, 429)."""
        if self._keys is None or path in self._public:
            return self._everybody
        # Anthropic's clients send their key in a header of its own
        bearer = [value.removeprefix("Bearer ") for value in headers.all("authorization")]
        client = self._keys.client([*bearer, *headers.all("x-api-key")])
        if client is None:
            raise ApiError(
                "this server needs an API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
                status=401,
                code="invalid_api_key",
            )
        client.take_request()
        return client


class _Headers:
    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._raw = [(name.decode("latin-1").lower(), value.decode("latin-1").strip()) for name, value in raw]

    def all(self, name: str) -> list[str]:
        return [value for given, value in self._raw if given == name]

    def first(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)

    def one(self, name: str) -> str | None:
        """The value of a header that stands there once and is not empty."""
        values = self.all(name)
        return values[0] if len(values) == 1 and values[0] else None


def _name_of(host: str) -> str:
    """A Host without its port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _is_trusted(name: str, hosts: Iterable[str]) -> bool:
    if name == "localhost" or name in hosts:
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def _is_preflight(scope: Scope, headers: _Headers) -> bool:
    return scope["method"] == "OPTIONS" and bool(headers.all("access-control-request-method"))


def _log_line(scope: Scope, caller: Caller, status: int | None, seconds: float) -> Mapping[str, Any]:
    """What is logged of a request: nothing that it says."""
    return {
        "request": caller.id,
        "key": caller.client.principal.key or None,
        "method": scope["method"],
        "path": scope["path"],
        "model": caller.model,
        "status": status,
        "seconds": round(seconds, 3),
        "prompt_tokens": caller.prompt_tokens,
        "completion_tokens": caller.completion_tokens,
    }


@dataclass
class _Reply:
    """The way back to the client: every response carries the headers, and its status is noted."""

    to_client: Send
    caller: Caller
    headers: dict[str, str]
    status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            mine = {"x-request-id": self.caller.id, "x-content-type-options": "nosniff", **self.headers}
            added = [(name.lower().encode(), value.encode("latin-1")) for name, value in mine.items()]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self.to_client(message)

    async def preflight(self, scope: Scope) -> None:
        """Tell a page of a trusted origin what its script may ask."""
        self.headers |= {
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, anthropic-version, anthropic-beta",
            "Access-Control-Max-Age": "600",
        }
        await self.send({"type": "http.response.start", "status": 204, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})


@dataclass
class _Bodies:
    """The bodies of all requests under way: the bytes that are left for more."""

    left: int

    def take(self, size: int) -> None:
        """Count bytes. Raises ApiError (503) where there are too many."""
        if size > self.left:
            raise ApiError(
                "the server holds too many large requests; try again in a moment",
                status=503,
                kind="server_error",
                code="server_overloaded",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self.left -= size


class _BodyReader:
    """A request's messages: its body within a size and a time, and then whether the client is still there and may be."""

    def __init__(
        self, receive: Callable[[], Awaitable[Message]], client: Client, most_bytes: int, seconds: float, bodies: _Bodies
    ) -> None:
        self._receive = receive
        self._client = client
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._left = most_bytes
        self._bodies = bodies
        #: Bytes of this one that are counted among all bodies.
        self._counted = 0
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._is_read = False
        self._waiting: asyncio.Future[Message] | None = None

    def check_announced(self, headers: _Headers) -> None:
        """Refuse a body by the length that it announces."""
        announced = headers.first("content-length") or "0"
        if announced.isdecimal() and int(announced) > self._most_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next message. Raises ApiError: 413 for a body that is too large, 408 for one that does not come."""
        if self._is_read:
            return await self._client_message()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                f"the body did not come within {self._seconds:g} s",
                status=408,
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise self._too_large()
        if (more := self._most_bytes - self._left - limits.UNCOUNTED - self._counted) > 0:
            self._bodies.take(more)
            self._counted += more
        self._is_read = not message.get("more_body", False)
        return message

    async def _client_message(self) -> Message:
        """What comes of the client behind its body: that it has left. One whose key is revoked is taken to have left."""
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(self._receive())
        revoked = asyncio.ensure_future(self._client.revoked.wait())
        try:
            await asyncio.wait((self._waiting, revoked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            revoked.cancel()
        if self._waiting.done():
            waiting, self._waiting = self._waiting, None
            return waiting.result()
        return {"type": "http.disconnect"}

    def close(self) -> None:
        """Wait for nothing more, and count the body no longer."""
        self._bodies.left += self._counted
        self._counted = 0
        if self._waiting is not None:
            self._waiting.cancel()

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body is larger than {self._most_bytes / _MIB:g} MiB, the most that this server reads",
            status=413,
            code="request_too_large",
        )
