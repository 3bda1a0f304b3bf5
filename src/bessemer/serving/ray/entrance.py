"""The entrance of a server with several replicas: the gate, and requests forwarded to a replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bessemer.serving.app import answer_error, error_body_of, watch_keys
from bessemer.serving.config import PARSED_AT_ONCE, ServingConfig
from bessemer.serving.ray.forwarding import Forwarded, ResponsePart
from bessemer.serving.ray.replica import ModelStatistics
from bessemer.serving.runtime.bodies import ApiError, overloaded
from bessemer.serving.runtime.clients import SCOPE, Caller, Keys
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.runtime.metrics import CONTENT_TYPE, render_metrics
from bessemer.serving.runtime.streams import client_left_response, until_client_leaves

#: Paths whose requests go to every replica, so that all serve the same.
_BROADCAST = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Replicas(Protocol):
    """The replicas, as the entrance calls them."""

    def send(self, request: Forwarded) -> AsyncGenerator[ResponsePart, None]:
        """The response of one replica. Closing it ends the request there.

        Raises ApiError where none is available, and the replica's own error.
        """

    async def broadcast(self, request: Forwarded) -> Sequence[Sequence[ResponsePart]]:
        """The response of each replica."""

    async def measure(self) -> Sequence[Sequence[ModelStatistics]]:
        """Statistics of the replicas that answer, one for each open model."""

    async def count_ready(self) -> int:
        """How many can answer requests."""


class Entrance:
    """An ASGI application that forwards requests to replicas. It alone has the keys, so that rate limits hold for all
    replicas."""

    def __init__(self, replicas: Replicas, name: str, config: ServingConfig, public: Collection[str]) -> None:
        """public: paths of pages that need no key. Raises as `Keys`."""
        self._replicas = replicas
        self._name = name
        asks_for_keys = config.keys is not None or config.api_key is not None
        self._keys = Keys(config.keys, config.api_key) if asks_for_keys else None
        gate = Middleware(Gate, config=config, keys=self._keys, error_body=error_body_of, public=PUBLIC.union(public))
        routes = [Route("/metrics", self.metrics), Route("/ready", self.ready), Route("/health", self.health)]
        handlers = dict.fromkeys((ApiError, HTTPException, Exception), answer_error)
        app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)
        app.router.redirect_slashes = False
        app.router.default = self._forward
        self._app: ASGIApp = app
        #: Requests under way.
        self.requests = 0
        #: Whether nothing new is begun, because the server is about to stop.
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def watch_keys(self) -> None:
        await watch_keys(self._keys)

    async def metrics(self, request: Request) -> Response:
        """Metrics of all replicas, with the replica's number as the label `engine`."""
        replicas = await self._replicas.measure()
        engines = [(model.model, str(number), model) for number, models in enumerate(replicas) for model in models]
        return Response(render_metrics(engines), media_type=CONTENT_TYPE)

    async def ready(self, request: Request) -> Response:
        """Whether new requests are accepted."""
        if self.is_draining:
            return JSONResponse({"status": "stopping", "model": self._name, "requests": self.requests}, status_code=503)
        ready = await self._replicas.count_ready()
        state = {"model": self._name, "replicas": ready, "requests": self.requests}
        return JSONResponse({"status": "ok" if ready else "failed", **state}, status_code=200 if ready else 503)

    async def health(self, request: Request) -> Response:
        """Whether the entrance runs. Ray restarts replicas that fail."""
        return JSONResponse({"status": "ok", "model": self._name, "requests": self.requests})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request. Raises ApiError."""
        if scope["type"] == "websocket":
            # a conversation on a connection is of one replica; clients fall back to HTTP
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return
        caller: Caller = scope[SCOPE]
        self.requests += 1
        try:
            body = await Request(scope, receive).body()
            # parsing a large prompt would block the event loop
            is_large = len(body) > PARSED_AT_ONCE
            request = (
                await asyncio.to_thread(Forwarded.of, scope, body, caller) if is_large else Forwarded.of(scope, body, caller)
            )
            if self.is_draining and scope["path"] not in PUBLIC:
                raise overloaded("the server is stopping; another one may answer")
            if scope["path"] in _BROADCAST:
                responses = await self._replicas.broadcast(request)
                await _send_parts(_worst(responses), caller, send)
            else:
                await self._pass_on(request, caller, receive, send)
        finally:
            self.requests -= 1

    async def _pass_on(self, request: Forwarded, caller: Caller, receive: Receive, send: Send) -> None:
        """Send a replica's response, until it ends or the client has left."""
        has_begun = False

        async def respond() -> None:
            nonlocal has_begun
            async with contextlib.aclosing(self._replicas.send(request)) as parts:
                async for part in parts:
                    has_begun = has_begun or bool(part.messages)
                    await _send_parts([part], caller, send)

        await until_client_leaves(receive, respond())
        if not has_begun:
            await client_left_response()(dict(request.scope), receive, send)


async def _send_parts(parts: Sequence[ResponsePart], caller: Caller, send: Send) -> None:
    """Send parts of a response to the client, and count their tokens."""
    for part in parts:
        caller.model = part.model
        caller.spend(prompt=part.prompt_tokens, completion=part.completion_tokens)
        for message in part.messages:
            await send(message)


def _worst(responses: Sequence[Sequence[ResponsePart]]) -> Sequence[ResponsePart]:
    """The response with the highest status. Raises ApiError where no replica responds."""
    if not responses:
        raise overloaded("no replica answers")
    return max(responses, key=lambda parts: next(int(message["status"]) for part in parts for message in part.messages))
