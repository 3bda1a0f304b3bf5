"""Routes of a rollout server: a trainer sends new weights or a new adapter, and frees the KV cache between its phases.

An update is `POST /v1/weights/begin`, pieces (`POST /v1/weights/piece`, bytes as in `inference.weight_transfer`), and
`POST /v1/weights/commit`, after which requests under way go on with the new weights. `/sleep`, `/wake_up` and `/is_sleeping`
are vLLM's.
The routes refuse where `accept_weights` is off.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from bessemer.core.errors import RequestError
from bessemer.inference.weight_transfer import StagedWeights
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served


class BeginUpdate(Body):
    """version: the weights' version from the commit on. adapter: its name, of an update that is of an adapter, with the scales
    of its layers."""

    version: int = Field(ge=0)
    adapter: Name | None = Field(None, pattern=r"^[\w.:-]+$", min_length=1)
    scales: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)


class CommitUpdate(Body):
    """The update that `begin` has answered."""

    update: str


@dataclass
class _Update:
    """An update that is being sent."""

    staged: StagedWeights
    version: int
    adapter: str | None
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class WeightsApi:
    """The routes. One update is sent at a time: a new one takes the place of one that was not committed."""

    def __init__(self, served: Served, config: ServingConfig) -> None:
        self._served = served
        self._accepts = config.accept_weights
        self._has_admins = config.keys is not None
        self._update: _Update | None = None

    def router(self) -> APIRouter:
        router = APIRouter()
        for method, path, endpoint in (
            ("GET", "/v1/weights", self.state),
            ("POST", "/v1/weights/begin", self.begin),
            ("POST", "/v1/weights/piece", self.piece),
            ("POST", "/v1/weights/commit", self.commit),
            ("POST", "/sleep", self.sleep),
            ("POST", "/wake_up", self.wake),
            ("GET", "/is_sleeping", self.is_sleeping),
        ):
            router.add_api_route(path, endpoint, methods=[method], response_model=None)
        return router

    async def state(self, request: Request) -> dict[str, Any]:
        """The version of the weights, and the adapters that are loaded."""
        self._check(request)
        engine = self._served.engine
        return {"weight_version": engine.weight_version, "adapters": list(engine.adapters)}

    async def begin(self, request: Request) -> dict[str, Any]:
        self._check(request)
        body = await read_body(BeginUpdate, request)
        if body.adapter is not None and body.adapter in self._served.names_of_model:
            raise ApiError(f"adapter: '{body.adapter}' is the model's own name", parameter="adapter", code="invalid_value")
        scales = None if body.adapter is None else body.scales
        staged = await asyncio.to_thread(StagedWeights, self._served.engine.model, scales)
        self._update = _Update(staged, body.version, body.adapter)
        return {"update": self._update.id}

    async def piece(self, request: Request, update: str) -> dict[str, Any]:
        self._check(request)
        staged = self._update_of(update).staged
        content = await request.body()
        with _refusals():
            await asyncio.to_thread(staged.add, content)
        return {"bytes": len(content)}

    async def commit(self, request: Request) -> dict[str, Any]:
        self._check(request)
        update = self._update_of((await read_body(CommitUpdate, request)).update)
        with _refusals():
            await asyncio.to_thread(self._apply, update)
        self._update = None
        return {"weight_version": self._served.engine.weight_version}

    async def sleep(self, request: Request) -> dict[str, Any]:
        self._check(request)
        with _refusals():
            await asyncio.to_thread(self._served.engine.sleep)
        return {"is_sleeping": True}

    async def wake(self, request: Request) -> dict[str, Any]:
        self._check(request)
        await asyncio.to_thread(self._served.engine.wake)
        return {"is_sleeping": False}

    async def is_sleeping(self, request: Request) -> dict[str, Any]:
        self._check(request)
        return {"is_sleeping": self._served.engine.is_asleep}

    def _apply(self, update: _Update) -> None:
        engine = self._served.engine
        if update.adapter is None:
            engine.update_weights(update.staged.weights(), version=update.version)
            return
        adapter = update.staged.adapter()
        if update.adapter not in engine.adapters:
            engine.load_adapter(update.adapter, adapter)
        engine.update_adapter(update.adapter, adapter, version=update.version)

    def _update_of(self, id: str) -> _Update:
        if self._update is None or self._update.id != id:
            raise ApiError("there is no such update; begin one", status=404, parameter="update", code="not_found")
        return self._update

    def _check(self, request: Request) -> None:
        """Raises ApiError (403) for a server that takes no weights, and for a key that is no admin's."""
        if not self._accepts:
            raise ApiError("this server takes no weights; start it with --accept-weights", status=403, code="not_allowed")
        if self._has_admins and not caller_of(request).client.is_admin:
            raise ApiError("weights are sent with an admin key", status=403, code="not_allowed")


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the engine's errors into the API's."""
    try:
        yield
    except RequestError as error:
        raise ApiError(str(error), code="invalid_value") from None
