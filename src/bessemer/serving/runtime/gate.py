"""The gate that every request passes before a route sees it: hosts, origins, keys, and the size and time of a body.

It reads ASGI messages and the scope's path, never a URL built from the client's headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bessemer.assistant.conversation import Principal
from bessemer.serving.config import BODIES, UNCOUNTED, ServingConfig
from bessemer.serving.runtime.bodies import ApiError, overloaded
from bessemer.serving.runtime.clients import SCOPE, Caller, Client, Keys

#: Makes an error's body, in the form of the API that a path belongs to.
ErrorBody = Callable[[str, ApiError], dict[str, Any]]
#: Paths that need no key: monitoring has none, and agents read a card to learn how to get one.
PUBLIC = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/.well-known/agent-card.json"})
_MIB = 2**20
#: The scheme of a key's header, in any case (RFC 9110, section 11.1).
_BEARER = re.compile(r"^bearer +", re.IGNORECASE)

#: Headers of requests that pages of another origin may send, besides those that they ask for.
_USUAL_HEADERS = ("authorization", "content-type", "x-api-key", "anthropic-version", "anthropic-beta")
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
#: Headers of answers that these pages may read.
_EXPOSED = "x-request-id, retry-after, x-max-tokens, x-dropped-tokens, x-summarised-tokens"

#: Name of the logger of requests.
REQUEST_LOG = "bessemer.requests"
_log = logging.getLogger(REQUEST_LOG)


class Gate:
    """Middleware. Refuses a request that must not reach a route; leaves a `Caller` in the scope of the others.

    - Host: an IP address, `localhost`, or a name in `hosts` (`*` is any). This stops DNS rebinding, where a page's host name
      is pointed at this machine.
    - Origin, of a page's script: this server's own, or one in `origins`, which get a CORS header.
    - Key: for every path that is not public.
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
        self._bodies = _Bodies(BODIES.most * _MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open_socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = Caller(self._everybody)
        reply = _Reply(send, caller, {})
        started = time.perf_counter()
        try:
            self._check_host(headers)
            reply.headers |= self._check_origin(headers)
            if _is_preflight(scope, headers):
                await reply.preflight(headers.get("access-control-request-headers", ""))
                return
            caller.client = self._client(scope["path"], headers)
            caller.client.take_request()
            body = _BodyReader(receive, caller.client, self._most_bytes, self._config.body_seconds, self._bodies)
            body.check_announced(headers)
            caller.receive = body.receive
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

    async def _open_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a WebSocket through, or refuse it: what a page's script opens is checked as what it requests. Its messages are
        counted as requests by what reads them."""
        headers = Headers(scope=scope)
        caller = Caller(self._everybody)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            caller.client = self._client(scope["path"], headers)
        except ApiError as error:
            answer = JSONResponse(self._error_body(scope["path"], error), error.status, error.headers)
            if "websocket.http.response" in scope.get("extensions", {}):
                begin = {"type": "websocket.http.response.start", "status": error.status, "headers": answer.raw_headers}
                await send(begin)
                await send({"type": "websocket.http.response.body", "body": answer.body})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        scope[SCOPE] = caller
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if (host := _host_of(headers)) is None:
            raise ApiError("the request needs one Host header", code="invalid_host")
        if "*" not in self._config.hosts and not _is_trusted(_name_of(host), self._config.hosts):
            raise ApiError(
                "this server does not answer to that Host; it may be let in with --allow-host", status=403, code="invalid_host"
            )

    def _check_origin(self, headers: Headers) -> dict[str, str]:
        """The CORS headers for an origin that is not the server's own."""
        if (origin := headers.get("origin")) is None:
            return {}
        if origin.lower() in self._config.origins:
            return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED, "Vary": "Origin"}
        if origin.lower().partition("://")[2] == (_host_of(headers) or "").lower():
            return {}
        raise ApiError(
            "pages of that Origin may not use this server; it may be let in with --allow-origin",
            status=403,
            code="invalid_origin",
        )

    def _client(self, path: str, headers: Headers) -> Client:
        """The client of a request. Raises ApiError (401)."""
        if self._keys is None or path in self._public:
            return self._everybody
        # Anthropic's clients send x-api-key
        bearer = [_BEARER.sub("", value) for value in headers.getlist("authorization")]
        given = [*bearer, *headers.getlist("x-api-key")]
        # Tinker's clients send only keys that begin with tml-, which may stand before a key of this server
        client = self._keys.client([*given, *(key.removeprefix("tml-") for key in given)])
        if client is None:
            raise ApiError(
                "this server needs an API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
                status=401,
                code="invalid_api_key",
            )
        return client


def _host_of(headers: Headers) -> str | None:
    """The Host header, which must occur once and not be empty."""
    hosts = headers.getlist("host")
    return hosts[0] if len(hosts) == 1 and hosts[0] else None


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


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _log_line(scope: Scope, caller: Caller, status: int | None, seconds: float) -> Mapping[str, Any]:
    """The log entry of a request: nothing of its content."""
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
    """Adds headers to the response, and notes its status."""

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

    async def preflight(self, asked: str) -> None:
        """Answer a CORS preflight of an allowed origin. asked: the headers that its request will have.

        They are let in whatever they are called, since clients send some that describe themselves (`x-stainless-os`).
        """
        names = {*_USUAL_HEADERS, *(name for each in asked.split(",") if _HEADER_NAME.fullmatch(name := each.strip().lower()))}
        self.headers |= {
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": ", ".join(sorted(names)),
            "Access-Control-Max-Age": "600",
        }
        await self.send({"type": "http.response.start", "status": 204, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})


@dataclass
class _Bodies:
    """Bytes that are left for the bodies of all requests under way."""

    left: int

    def take(self, size: int) -> None:
        """Count bytes. Raises ApiError (503) where there are too many."""
        if size > self.left:
            raise overloaded("the server holds too many large requests; try again in a moment", headers={"Connection": "close"})
        self.left -= size


class _BodyReader:
    """Receives a request's ASGI messages: the body, within limits of size and time, and then the client's disconnect."""

    def __init__(
        self, receive: Callable[[], Awaitable[Message]], client: Client, most_bytes: int, seconds: float, bodies: _Bodies
    ) -> None:
        self._receive = receive
        self._client = client
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._left = most_bytes
        self._bodies = bodies
        #: Bytes of this body that were taken from `bodies`.
        self._counted = 0
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._is_read = False
        self._waiting: asyncio.Future[Message] | None = None

    def check_announced(self, headers: Headers) -> None:
        """Refuse a body by its Content-Length."""
        announced = headers.get("content-length") or "0"
        if announced.isdecimal() and int(announced) > self._most_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next message. Raises ApiError: 413 for a body that is too large, 408 for one that is too slow."""
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
        if (more := self._most_bytes - self._left - UNCOUNTED - self._counted) > 0:
            self._bodies.take(more)
            self._counted += more
        self._is_read = not message.get("more_body", False)
        return message

    async def _client_message(self) -> Message:
        """Wait for the client to disconnect. A client whose key is revoked counts as disconnected."""
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
        """Stop waiting, and give the body's bytes back."""
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
