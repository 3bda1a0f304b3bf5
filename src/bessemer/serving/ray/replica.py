"""A replica: an engine with the whole application, reachable through the entrance alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.statistics import EngineStatistics  # noqa: E402
from bessemer.serving.app import Pages, create_app, no_pages  # noqa: E402
from bessemer.serving.config import ServingConfig  # noqa: E402
from bessemer.serving.ray.forwarding import Forwarded, ResponsePart, answer  # noqa: E402
from bessemer.serving.responses.store import StoredResponse  # noqa: E402
from bessemer.serving.runtime.admission import QueueLimits  # noqa: E402
from bessemer.serving.runtime.bodies import ApiError  # noqa: E402
from bessemer.serving.runtime.models import ModelSetup  # noqa: E402
from bessemer.serving.runtime.served import Served  # noqa: E402


@dataclass(frozen=True)
class ModelStatistics:
    """The statistics of one model of a replica at one moment."""

    model: str
    statistics: EngineStatistics
    adapters: tuple[str, ...]


class SharedStore:
    """Stored responses that all replicas share, in an actor of Ray. keeper: its handle, of a `MemoryStore`."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    async def keep(self, identity: str, response: StoredResponse) -> None:
        with _keeper_errors():
            await self._keeper.keep.remote(identity, response)

    async def find(self, identity: str) -> StoredResponse | None:
        with _keeper_errors():
            response: StoredResponse | None = await self._keeper.find.remote(identity)
        return response

    async def drop(self, identity: str) -> None:
        with _keeper_errors():
            await self._keeper.drop.remote(identity)


class EngineReplica:
    """The actor that Ray runs as a replica."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        setup: ModelSetup,
        config: ServingConfig,
        make_pages: Callable[[], Callable[[Served], Pages]] | None,
        keeper: Any,
    ) -> None:
        """make_pages: makes the `pages` of `create_app`. keeper: as for `SharedStore`."""
        self._engine = setup.open_engine()
        pool = setup.model_pool(config.max_waiting, QueueLimits(config.max_queued, config.queue_seconds))
        pages = no_pages if make_pages is None else make_pages()
        self._app = create_app(self._engine, setup.name, config, pages, pool, store=SharedStore(keeper), is_behind_gate=True)
        self._name = setup.name
        self._served: Served = self._app.state.served
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, request: Forwarded) -> AsyncGenerator[ResponsePart, None]:
        """The response to a request, as it comes. Closing or cancelling it ends the request."""
        async with aclosing(answer(self._app, request)) as parts:
            async for part in parts:
                yield part

    async def whole_answer(self, request: Forwarded) -> list[ResponsePart]:
        """The same at once, for broadcast requests."""
        return [part async for part in answer(self._app, request)]

    async def measured(self) -> list[ModelStatistics]:
        """Statistics of the model and of open additional models. Waits for the engines' current steps."""
        return await asyncio.to_thread(self._measure)

    def is_ready(self) -> bool:
        return self._failure is None

    def _measure(self) -> list[ModelStatistics]:
        engines = [(self._name, self._engine), *((model.name, model.engine) for model in self._served.open_additional)]
        return [ModelStatistics(name, _sendable(engine.statistics), engine.adapters) for name, engine in engines]

    def check_health(self) -> None:
        """Raises the failure of the engine or its thread: Ray then replaces the replica."""
        if (failure := self._failure) is not None:
            raise failure

    @property
    def _failure(self) -> Exception | None:
        return self._served.worker.failure

    async def __del__(self) -> None:
        """Ray calls it when a replica ends."""
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)
        if hasattr(self, "_engine"):
            self._engine.close()


@contextmanager
def _keeper_errors() -> Generator[None, None, None]:
    """Turn errors of the store's actor into 503: it may be restarting."""
    try:
        yield
    except Exception as error:
        raise ApiError(
            f"stored responses cannot be reached now ({type(error).__name__})",
            status=503,
            kind="server_error",
            headers={"Retry-After": "5"},
        ) from None


def _sendable(statistics: EngineStatistics) -> EngineStatistics:
    """Statistics that can be pickled: a plain dictionary instead of a view."""
    return replace(statistics, finished=dict(statistics.finished))
