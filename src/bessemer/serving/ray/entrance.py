"""The entrance: the gate, and the way to the replicas and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bessemer.serving import config as limits
from bessemer.serving.app import answer_api_error, answer_failure, answer_http_error, error_body_of, watch
from bessemer.serving.config import ServingConfig
from bessemer.serving.ray.forwarding import Forwarded, Part
from bessemer.serving.ray.replica import Measured
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import SCOPE, Caller, Keys
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.runtime.metrics import CONTENT_TYPE, Metrics
from bessemer.serving.runtime.streams import CLIENT_LEFT

#: What every replica has to do, so that they all serve the same.
_OF_ALL = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
#: Seconds that a refused client is told to wait.
_RETRY_AFTER = "1"


class Replicas(Protocol):
    """The replicas, as the entrance asks them."""

    def ask(self, asked: Forwarded) -> AsyncGenerator[Part, None]:
        """The answer of one of them. Closing it ends the request there.

        Raises ApiError where none can answer, and what a replica failed of.
        """

    async def ask_all(self, asked: Forwarded) -> Sequence[Sequence[Part]]:
        """The answers of all."""

    async def measure(self) -> Sequence[Sequence[Measured]]:
        """The statistics of those that answer."""

    async def count_ready(self) -> int:
        """How many can answer requests."""


@dataclass(frozen=True)
class _Told:
    """What `/metrics` tells of one model of one replica."""

    statistics: Any
    adapters: tuple[str, ...]


class Entrance:
    """An application that answers every request by a replica. It has the keys, so that what a key may use is counted once."""

    def __init__(self, replicas: Replicas, name: str, config: ServingConfig, public: Collection[str]) -> None:
        """public: paths of pages that need no key. Raises as `Keys`."""
        self._replicas = replicas
        self._name = name
        asks_for_keys = config.keys is not None or config.api_key is not None
        self._keys = Keys(config.keys, config.api_key) if asks_for_keys else None
        gate = Middleware(Gate, config=config, keys=self._keys, error_body=error_body_of, public=PUBLIC.union(public))
        routes = [Route("/metrics", self.tell_metrics), Route("/ready", self.ready), Route("/health", self.health)]
        handlers = {ApiError: answer_api_error, HTTPException: answer_http_error, Exception: answer_failure}
        app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)
        app.router.redirect_slashes = False
        app.router.default = self._forward
        self._app: ASGIApp = app
        #: Requests under way.
        self.requests = 0
        #: Whether nothing new is begun, because the server is about to stop.
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await self._app(scope, receive, send)

    async def watch_keys(self) -> None:
        """Look for changes of the keys until cancelled."""
        await watch(self._keys)

    async def tell_metrics(self, request: Request) -> Response:
        """Those of all replicas, told apart by the label `engine`."""
        found = await self._replicas.measure()
        engines = [
            (one.model, str(number), _Told(one.statistics, one.adapters)) for number, each in enumerate(found) for one in each
        ]
        return Response(Metrics(lambda: engines).render(), media_type=CONTENT_TYPE)

    async def ready(self, request: Request) -> Response:
        """Whether new requests are answered."""
        if self.is_draining:
            return JSONResponse({"status": "stopping", "model": self._name, "requests": self.requests}, status_code=503)
        ready = await self._replicas.count_ready()
        state = {"model": self._name, "replicas": ready, "requests": self.requests}
        return JSONResponse({"status": "ok" if ready else "failed", **state}, status_code=200 if ready else 503)

    async def health(self, request: Request) -> Response:
        """That the entrance is there. Replicas that fail are Ray's to start again."""
        return JSONResponse({"status": "ok", "model": self._name, "requests": self.requests})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other request. Raises ApiError."""
        if scope["type"] != "http":
            return
        caller: Caller = scope[SCOPE]
        self.requests += 1
        try:
            body = await Request(scope, receive).body()
            # beside the event loop where it is large: a prompt is parsed
            is_large = len(body) > limits.PARSED_AT_ONCE
            asked = (
                await asyncio.to_thread(Forwarded.of, scope, body, caller) if is_large else Forwarded.of(scope, body, caller)
            )
            if self.is_draining and scope["path"] not in PUBLIC:
                raise unavailable("the server is stopping; another one may answer")
            if scope["path"] in _OF_ALL:
                answers = await self._replicas.ask_all(asked)
                await _tell(_worst(answers), caller, send)
            else:
                await self._pass_on(asked, caller, receive, send)
        finally:
            self.requests -= 1

    async def _pass_on(self, asked: Forwarded, caller: Caller, receive: Receive, send: Send) -> None:
        """A replica's answer, until it is over or the client has left."""
        has_begun = False

        async def tell() -> None:
            nonlocal has_begun
            async with contextlib.aclosing(self._replicas.ask(asked)) as parts:
                async for part in parts:
                    has_begun = has_begun or bool(part.messages)
                    await _tell([part], caller, send)

        telling, leaving = asyncio.ensure_future(tell()), asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({telling, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
        finally:
            leaving.cancel()
            if not telling.done():
                telling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await telling
        if not has_begun:
            # it is never received, but the server that runs the application waits for it
            await Response(status_code=CLIENT_LEFT)(dict(asked.scope), receive, send)


async def _tell(parts: Sequence[Part], caller: Caller, send: Send) -> None:
    """Send parts of an answer to the client, and count what they used."""
    for part in parts:
        caller.model = part.model
        caller.spend(prompt=part.prompt_tokens, completion=part.completion_tokens)
        for message in part.messages:
            await send(message)


def _worst(answers: Sequence[Sequence[Part]]) -> Sequence[Part]:
    """The answer with the highest status of those that all replicas gave. Raises ApiError where there is none."""
    if not answers:
        raise unavailable("no replica answers")
    return max(answers, key=lambda parts: next(_status(message) for part in parts for message in part.messages))


def _status(message: Message) -> int:
    return int(message["status"])


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def unavailable(reason: str) -> ApiError:
    """A refusal for now."""
    return ApiError(reason, status=503, kind="server_error", code="server_overloaded", headers={"Retry-After": _RETRY_AFTER})
