"""A replica: an engine with the whole application around it, asked by the entrance and by nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.statistics import EngineStatistics  # noqa: E402
from bessemer.serving.app import Pages, create_app, no_pages  # noqa: E402
from bessemer.serving.config import ServingConfig  # noqa: E402
from bessemer.serving.ray.forwarding import Forwarded, Part, answer  # noqa: E402
from bessemer.serving.responses.protocol import StoredResponse  # noqa: E402
from bessemer.serving.runtime.bodies import ApiError  # noqa: E402
from bessemer.serving.runtime.models import Opening  # noqa: E402
from bessemer.serving.runtime.served import Served  # noqa: E402


@dataclass(frozen=True)
class Measured:
    """The statistics of one model of a replica at one moment."""

    model: str
    statistics: EngineStatistics
    adapters: tuple[str, ...]


class SharedStore:
    """The responses that all replicas share, in an actor of Ray. keeper: its handle, of a `MemoryStore`."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    async def keep(self, identity: str, response: StoredResponse) -> None:
        with _keeper_errors():
            await self._keeper.keep.remote(identity, response)

    async def find(self, identity: str) -> StoredResponse | None:
        with _keeper_errors():
            found: StoredResponse | None = await self._keeper.find.remote(identity)
        return found

    async def drop(self, identity: str) -> None:
        with _keeper_errors():
            await self._keeper.drop.remote(identity)


class EngineReplica:
    """What Ray runs as a replica."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        opening: Opening,
        config: ServingConfig,
        make_pages: Callable[[], Callable[[Served], Pages]] | None,
        keeper: Any,
    ) -> None:
        """make_pages: makes what `create_app` takes as pages. keeper: as for `SharedStore`."""
        self._engine = opening.open_engine()
        shelf = opening.shelf(config.max_waiting)
        pages = no_pages if make_pages is None else make_pages()
        self._app = create_app(self._engine, opening.name, config, pages, shelf, store=SharedStore(keeper), is_behind_gate=True)
        self._name = opening.name
        self._shelf = shelf
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, asked: Forwarded) -> AsyncGenerator[Part, None]:
        """The answer to a request, as it comes; ended when it is closed or cancelled."""
        async with aclosing(answer(self._app, asked)) as parts:
            async for part in parts:
                yield part

    async def whole_answer(self, asked: Forwarded) -> list[Part]:
        """The same at once, for what every replica is to do."""
        return [part async for part in answer(self._app, asked)]

    async def measured(self) -> list[Measured]:
        """The statistics of the model, and of those beside it that are open. They wait for the step under way."""
        return await asyncio.to_thread(self._measure)

    def is_ready(self) -> bool:
        """Whether it can answer requests."""
        return self._failure is None

    def _measure(self) -> list[Measured]:
        beside = [] if self._shelf is None else self._shelf.open_models
        engines = [(self._name, self._engine), *((one.name, one.engine) for one in beside)]
        return [Measured(name, _sendable(engine.statistics), engine.adapters) for name, engine in engines]

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises here. Raises the failure of the engine or of its thread."""
        if (failure := self._failure) is not None:
            raise failure

    @property
    def _failure(self) -> Exception | None:
        failure: Exception | None = self._app.state.served.worker.failure
        return failure

    async def __del__(self) -> None:
        """Ray calls it when a replica ends."""
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)
        if hasattr(self, "_engine"):
            self._engine.close()


@contextmanager
def _keeper_errors() -> Generator[None, None, None]:
    """The actor that keeps the responses may be starting again."""
    try:
        yield
    except Exception as error:
        raise ApiError(
            f"stored responses cannot be reached now ({type(error).__name__})",
            status=503,
            kind="server_error",
            headers={"Retry-After": "5"},
        ) from None


def _sendable(found: EngineStatistics) -> EngineStatistics:
    """Statistics without views of mappings, which cannot be sent to another process."""
    finished: Mapping[Any, int] = dict(found.finished)
    return replace(found, finished=finished)
