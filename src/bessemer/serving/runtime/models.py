"""Additional models, loaded on demand and unloaded when idle; and what a server opens, described before any of it is open."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bessemer.core.errors import BessemerError
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.storage.tuned_folder import TunedModel, tuned_model
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.worker import TextEngine, Worker

#: Seconds between two looks for models that nobody asks for.
LOOK_SECONDS = 5.0
_GIB = 2**30


@dataclass(eq=False)
class OpenModel:
    """A model that is open. size: bytes of its files; used: when it was last asked for."""

    name: str
    engine: TextEngine
    worker: Worker
    size: int
    used: float

    def close(self) -> None:
        """End its requests and its thread, and give its memory back."""
        self.worker.close()
        self.engine.close()
        # weights and caches that only rings of references hold
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Shelf:
    """The models that a server may open, by name. All of it is of one event loop; files are read beside it."""

    def __init__(
        self,
        places: Mapping[str, Path],
        open_engine: Callable[[Path], TextEngine],
        *,
        max_waiting: int,
        most: int = 2,
        memory: float | None = None,
        keep_alive: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """places: folder or GGUF file of each. most: how many are open at once. memory: GiB that their files together may have;
        None: what is free. keep_alive: seconds after its last request at which a model is closed; None: never."""
        self._places = dict(places)
        self._open_engine = open_engine
        self._max_waiting = max_waiting
        self._most = most
        self._memory = None if memory is None else round(memory * _GIB)
        self._keep_alive = keep_alive
        self._clock = clock
        self._open: dict[str, OpenModel] = {}
        self._opening = asyncio.Lock()
        self.is_draining = False
        self.is_closed = False
        #: Requests that wait for their model.
        self._awaited = 0
        #: Leases of each model.
        self._leases: Counter[str] = Counter()
        #: Models that have failed, to be ended before the next is opened.
        self._leaving: list[OpenModel] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The models that may be asked for."""
        return tuple(self._places)

    @property
    def open_models(self) -> list[OpenModel]:
        """Those that are open now."""
        return list(self._open.values())

    @property
    def requests(self) -> int:
        """API requests of all of them that are under way, those among them that wait for their model."""
        return self._awaited + sum(one.worker.requests for one in self._open.values())

    @contextmanager
    def lease(self, name: str) -> Generator[None, None, None]:
        """Keep a model from being closed for another, or because nobody asks for it.

        A request holds one from before the model is opened to its end: another may run between the opening and the admission.
        """
        self._leases[name] += 1
        try:
            yield
        finally:
            self._leases[name] -= 1

    async def model(self, name: str) -> OpenModel:
        """A model that is open, opened if it must be. It stays open while a lease is held, or a request of it runs.

        Raises ApiError: 503 where no place is free, or the model cannot be opened.
        """
        if (found := self._usable(name)) is not None:
            return found
        self._awaited += 1
        try:
            # one whose client leaves is opened to its end, for the next
            return await asyncio.shield(self._opened(name))
        finally:
            self._awaited -= 1

    def drain(self) -> None:
        """Begin nothing new."""
        self.is_draining = True
        for one in self._open.values():
            one.worker.is_draining = True

    async def close_idle(self) -> None:
        """Close what nobody has asked for in the time that is kept."""
        now = self._clock()
        for one in self.open_models:
            if not self._is_idle(one):
                one.used = now
            elif self._keep_alive is not None and now - one.used >= self._keep_alive:
                await self._close(one)

    async def close(self) -> None:
        """Close all, and what is being opened as soon as it is open."""
        self.is_closed = True
        async with self._opening:
            for one in self.open_models:
                await self._close(one)

    async def _opened(self, name: str) -> OpenModel:
        async with self._opening:
            if (found := self._usable(name)) is not None:
                return found
            place = self._places[name]
            try:
                size = size_of(place)
                await self._make_room(name, size)
                engine = await asyncio.to_thread(self._open_engine, place)
            except (BessemerError, OSError, RuntimeError, MemoryError) as error:
                raise ApiError(
                    f"the model '{name}' cannot be opened: {_without_place(error, place)}",
                    status=503,
                    kind="server_error",
                    headers={"Retry-After": "30"},
                ) from None
            found = OpenModel(name, engine, Worker(engine, self._max_waiting), size, self._clock())
            if self.is_draining or self.is_closed:
                await asyncio.to_thread(found.close)
                raise _busy("the server is stopping; another one may answer")
            self._open[name] = found
            return found

    def _usable(self, name: str) -> OpenModel | None:
        found = self._open.get(name)
        if found is not None and found.worker.failure is not None and found.worker.requests == 0:
            # one that has failed is opened again
            del self._open[name]
            found.worker.is_draining = True
            self._leaving.append(found)
            return None
        if found is not None:
            found.used = self._clock()
        return found

    async def _make_room(self, name: str, size: int) -> None:
        """Close the models that were asked for the longest time ago until another fits. None is closed where that would not do.

        Raises ApiError (503).
        """
        if self.is_draining:
            raise _busy("the server is stopping; another one may answer")
        if self._memory is not None and size > self._memory:
            raise ApiError(
                f"the model '{name}' is larger than the memory for models: {size / _GIB:.1f} of {self._memory / _GIB:.1f} GiB",
                status=503,
                kind="server_error",
            )
        for failed in self._leaving:
            await asyncio.to_thread(failed.close)
        self._leaving.clear()
        staying = self.open_models
        idle = sorted(filter(self._is_idle, staying), key=lambda one: one.used)
        leaving: list[OpenModel] = []
        while not self._fits(size, [one for one in staying if one not in leaving]):
            if len(leaving) == len(idle):
                raise _busy(f"no place is free for '{name}' while the other models answer; try again in a moment")
            leaving.append(idle[len(leaving)])
        for one in leaving:
            await self._close(one)

    def _is_idle(self, one: OpenModel) -> bool:
        return one.worker.requests == 0 and self._leases[one.name] == 0

    def _fits(self, size: int, others: Sequence[OpenModel]) -> bool:
        held = sum(one.size for one in others)
        return len(others) < self._most and (self._memory is None or held + size <= self._memory)

    async def _close(self, one: OpenModel) -> None:
        """Take it off the shelf at once, and end it beside the event loop: its thread may be in the middle of a step."""
        del self._open[one.name]
        one.worker.is_draining = True
        await asyncio.to_thread(one.close)


def size_of(place: Path) -> int:
    """Bytes of a model's weights on disk."""
    if place.is_file():
        return place.stat().st_size
    weights, adapter = tuned_model(place) or TunedModel(place, None)
    folders = [weights] if adapter is None else [weights, adapter]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _without_place(error: Exception, place: Path) -> str:
    """The error, without where the model lies on this machine."""
    return str(error).replace(str(place), place.name)


def _busy(reason: str) -> ApiError:
    return ApiError(reason, status=503, kind="server_error", code="server_overloaded", headers={"Retry-After": "1"})


@dataclass(frozen=True)
class Opening:
    """A model with its adapters, and the models beside it, by name.

    model: a folder or a GGUF file. beside: models that are opened when they are asked for; max_models, models_memory,
    keep_alive: of these, as `Shelf` has them.
    """

    model: Path
    name: str
    device: str = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    max_models: int = 2
    models_memory: float | None = None
    keep_alive: float | None = None

    def open_engine(self) -> Engine:
        """The engine with its adapters. Raises what `Engine` and `load_adapter` raise."""
        engine = Engine(self.model, device=self.device, config=self.engine)
        try:
            for name, folder in self.adapters.items():
                engine.load_adapter(name, folder)
        except BaseException:
            engine.close()
            raise
        return engine

    def shelf(self, max_waiting: int) -> Shelf | None:
        """The models beside it, none of them open yet."""
        if not self.beside:
            return None
        return Shelf(
            self.beside,
            lambda place: Engine(place, device=self.device, config=self.engine),
            max_waiting=max_waiting,
            most=self.max_models,
            memory=self.models_memory,
            keep_alive=self.keep_alive,
        )
