"""What a server opens: the first model, and additional models, which are loaded on demand and unloaded when idle.

A request whose model has to be loaded waits while others are, and then until a model that it may take the place of is idle.
While one waits so, later requests for additional models wait behind it: else those of an open model would never let it be idle.
"""

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
from bessemer.serving.runtime.admission import NO_QUEUE, RETRY_SECONDS, QueueLimits
from bessemer.serving.runtime.bodies import ApiError, overloaded, without_places
from bessemer.serving.runtime.worker import Worker
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.trained_template import check_trained_template

#: Seconds between two checks for idle models.
IDLE_CHECK_SECONDS = 5.0
_GIB = 2**30


@dataclass(eq=False)
class OpenModel:
    """A loaded model. size: of its files, in bytes; used: time of its last request, by the pool's clock."""

    name: str
    engine: Engine
    worker: Worker
    size: int
    used: float

    def close(self) -> None:
        """End its requests and its thread, and give its memory back."""
        self.worker.close()
        self.engine.close()
        # weights and caches are in reference cycles
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class ModelPool:
    """Additional models by name. Call it from one event loop; models are loaded in threads."""

    def __init__(
        self,
        places: Mapping[str, Path],
        open_engine: Callable[[Path], Engine],
        *,
        max_waiting: int,
        queue: QueueLimits = NO_QUEUE,
        most: int = 2,
        memory: float | None = None,
        keep_alive: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """places: folder or GGUF file of each model. queue: of requests that wait for a model's turn, and of each model's
        worker. most: open at once. memory: limit on the size of their files together, in GiB. keep_alive: idle seconds after
        which a model is closed; None: never."""
        self._places = dict(places)
        self._open_engine = open_engine
        self._max_waiting = max_waiting
        self._queue = queue
        self._most = most
        self._memory = None if memory is None else round(memory * _GIB)
        self._keep_alive = keep_alive
        self._clock = clock
        self._open: dict[str, OpenModel] = {}
        self._opening = asyncio.Lock()
        self.is_draining = False
        self.is_closed = False
        #: The model that is being loaded, and since when.
        self._loading: tuple[str, float] | None = None
        #: Requests that wait for their model to be loaded.
        self._awaited = 0
        #: Whether the first of them waits for a model to be idle, and what tells it that one may be.
        self._seeks_room = False
        self._may_be_idle = asyncio.Event()
        self._leases: Counter[str] = Counter()
        #: Of these, those of requests that wait still.
        self._waiting_leases: Counter[str] = Counter()
        #: Models that serve no more, which are closed before the next one is opened.
        self._withdrawn: list[OpenModel] = []

    @property
    def names(self) -> tuple[str, ...]:
        """All models, open or not."""
        return tuple(self._places)

    @property
    def open_models(self) -> list[OpenModel]:
        return list(self._open.values())

    def loading_seconds(self, name: str) -> float | None:
        """For how long a model has been loading; None: it is not."""
        if self._loading is None or self._loading[0] != name:
            return None
        return self._clock() - self._loading[1]

    def size(self, name: str) -> int:
        """Bytes of a model's weights on disk. Raises OSError and BessemerError where they cannot be found."""
        return size_of(self._places[name])

    @property
    def requests(self) -> int:
        """API requests of all models, those that wait for a model to be loaded included."""
        return self._awaited + sum(model.worker.requests for model in self._open.values())

    @contextmanager
    def lease(self, name: str) -> Generator[None, None, None]:
        """Keep a model open.

        A request holds a lease from before the model is opened: another request could close it between opening and admission.
        """
        self._leases[name] += 1
        try:
            yield
        finally:
            self._leases[name] -= 1
            self._may_be_idle.set()

    async def model(self, name: str) -> OpenModel:
        """An open model, loaded if need be. It stays open while a lease is held or one of its requests runs. The caller holds
        one.

        Raises ApiError (503) where no place is free for as long as the queue allows, too many wait, or loading fails.
        """
        if not self._seeks_room and (model := self._usable(name)) is not None:
            return model
        # the one that loads is not in the queue
        if 0 < self._queue.most < self._awaited:
            raise overloaded(f"{self._awaited} requests wait for their model; try again later", RETRY_SECONDS)
        self._awaited += 1
        try:
            if (found := await self._turn(name)) is not None:
                return found
            # a model is loaded to the end even if its client leaves: the next one gets it
            return await asyncio.shield(self._opened(name))
        finally:
            self._awaited -= 1

    def drain(self) -> None:
        self.is_draining = True
        self._may_be_idle.set()
        for model in self._open.values():
            model.worker.is_draining = True

    async def close_idle(self) -> None:
        """Close models that were idle for `keep_alive` seconds."""
        now = self._clock()
        for model in self.open_models:
            if not self._is_idle(model):
                model.used = now
            elif self._keep_alive is not None and now - model.used >= self._keep_alive:
                await self._close(model)

    async def close(self) -> None:
        """Close all models, also one that is being loaded."""
        self.is_closed = True
        self._may_be_idle.set()
        async with self._opening:
            for model in self.open_models:
                await self._close(model)

    async def _turn(self, name: str) -> OpenModel | None:
        """Wait until it is this request's turn: its model, where that is open by now; None where it is to load it, which others
        cannot until `_opened` ends. Raises ApiError (503)."""
        self._waiting_leases[name] += 1
        self._may_be_idle.set()
        try:
            async with asyncio.timeout(self._queue.seconds if self._queue.most else None):
                await self._opening.acquire()
                try:
                    model = await self._room_for(name)
                except BaseException:
                    self._opening.release()
                    raise
                if model is not None:
                    self._opening.release()
                return model
        except TimeoutError:
            raise overloaded(
                f"'{name}' had no turn within {self._queue.seconds:g} s, while other models were loaded and answered; "
                "try again later",
                RETRY_SECONDS,
            ) from None
        finally:
            self._waiting_leases[name] -= 1

    async def _room_for(self, name: str) -> OpenModel | None:
        """Wait until enough models are idle that another fits, and withdraw these; itself, where it is open. Raises ApiError
        (503)."""
        try:
            while (model := self._usable(name)) is None:
                with self._opening_errors(name):
                    idle = self._in_the_way(name, size_of(self._places[name]))
                if idle is not None:
                    for each in idle:
                        self._withdraw(each)
                    return None
                if not self._queue.most:
                    raise overloaded(f"no place is free for '{name}' while the other models answer; try again in a moment")
                self._seeks_room = True
                self._may_be_idle.clear()
                await self._may_be_idle.wait()
            return model
        finally:
            self._seeks_room = False

    async def _opened(self, name: str) -> OpenModel:
        """Load a model whose turn it is."""
        place = self._places[name]
        self._loading = name, self._clock()
        try:
            with self._opening_errors(name):
                while self._withdrawn:
                    await asyncio.to_thread(self._withdrawn.pop().close)
                size = size_of(place)
                engine = await asyncio.to_thread(self._open_engine, place)
            model = OpenModel(name, engine, Worker(engine, self._max_waiting, self._queue), size, self._clock())
            if self.is_draining or self.is_closed:
                await asyncio.to_thread(model.close)
                raise overloaded("the server is stopping; another one may answer")
            self._open[name] = model
            return model
        finally:
            self._loading = None
            self._opening.release()

    @contextmanager
    def _opening_errors(self, name: str) -> Generator[None, None, None]:
        """Turn errors of a model that cannot be opened into the API's."""
        try:
            yield
        except (BessemerError, OSError, RuntimeError, MemoryError) as error:
            raise ApiError(
                f"the model '{name}' cannot be opened: {_without_places(error, self._places[name])}",
                status=503,
                kind="server_error",
                headers={"Retry-After": "30"},
            ) from None

    def _usable(self, name: str) -> OpenModel | None:
        """An open model that works. A failed one is given up once it has no requests, and will be opened again."""
        model = self._open.get(name)
        if model is None:
            return None
        if model.worker.failure is not None and model.worker.requests == 0:
            self._withdraw(model)
            return None
        model.used = self._clock()
        return model

    def _withdraw(self, model: OpenModel) -> None:
        """Let a model serve no more requests."""
        del self._open[model.name]
        model.worker.is_draining = True
        self._withdrawn.append(model)

    def _in_the_way(self, name: str, size: int) -> list[OpenModel] | None:
        """The least recently used idle models without which another fits; None where too few are idle.

        Raises ApiError (503).
        """
        if self.is_draining or self.is_closed:
            raise overloaded("the server is stopping; another one may answer")
        if self._memory is not None and size > self._memory:
            raise ApiError(
                f"the model '{name}' is larger than the memory for models: {size / _GIB:.1f} of {self._memory / _GIB:.1f} GiB",
                status=503,
                kind="server_error",
            )
        staying = self.open_models
        idle = sorted(filter(self._is_idle, staying), key=lambda model: model.used)
        closing: list[OpenModel] = []
        while not self._fits(size, [model for model in staying if model not in closing]):
            if len(closing) == len(idle):
                return None
            closing.append(idle[len(closing)])
        return closing

    def _is_idle(self, model: OpenModel) -> bool:
        return model.worker.requests == 0 and self._leases[model.name] <= self._waiting_leases[model.name]

    def _fits(self, size: int, others: Sequence[OpenModel]) -> bool:
        total = size + sum(model.size for model in others)
        return len(others) < self._most and (self._memory is None or total <= self._memory)

    async def _close(self, model: OpenModel) -> None:
        """Withdraw a model at once, and close it in a thread: its engine may be in the middle of a step."""
        del self._open[model.name]
        model.worker.is_draining = True
        await asyncio.to_thread(model.close)


def size_of(place: Path) -> int:
    """Bytes of a model's weights on disk."""
    if place.is_file():
        return place.stat().st_size
    weights, adapter = tuned_model(place) or TunedModel(place, None)
    folders = [weights] if adapter is None else [weights, adapter]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _without_places(error: Exception, place: Path) -> str:
    """The error's text without paths, which are not for clients. place: of the model, which may hold spaces."""
    return without_places(str(error).replace(str(place), place.name))


@dataclass(frozen=True)
class ModelSetup:
    """A model with its adapters, and additional models, all by name; nothing is loaded yet.

    model: a folder or a GGUF file. max_models, models_memory, keep_alive: limits of the additional models' `ModelPool`.
    other_template: whether a chat template may be another than the one in training.
    """

    model: Path
    name: str
    device: str = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    additional: Mapping[str, Path] = field(default_factory=dict)
    max_models: int = 2
    models_memory: float | None = None
    keep_alive: float | None = None
    other_template: bool = False

    def open_engine(self) -> Engine:
        """The engine with its adapters. Raises what `Engine` and `load_adapter` raise, and ArtefactError for a chat template
        that is not the one in training."""
        engine = self._open(self.model)
        try:
            for name, folder in self.adapters.items():
                if not self.other_template:
                    check_trained_template([folder], engine.tokenizer.chat_template)
                engine.load_adapter(name, folder)
        except BaseException:
            engine.close()
            raise
        return engine

    def model_pool(self, max_waiting: int, queue: QueueLimits) -> ModelPool | None:
        """The additional models, none of them loaded yet. Arguments as of `ModelPool`."""
        if not self.additional:
            return None
        return ModelPool(
            self.additional,
            self._open,
            max_waiting=max_waiting,
            queue=queue,
            most=self.max_models,
            memory=self.models_memory,
            keep_alive=self.keep_alive,
        )

    def _open(self, place: Path) -> Engine:
        """A model's engine, after a check of its template, before weights are read."""
        if not self.other_template and place.is_dir():
            tuned = tuned_model(place) or TunedModel(place, None)
            folders = [tuned.folder] if tuned.adapter is None else [tuned.folder, tuned.adapter]
            check_trained_template(folders, load_tokenizer(tuned.folder).chat_template)
        return Engine(place, device=self.device, config=self.engine)
