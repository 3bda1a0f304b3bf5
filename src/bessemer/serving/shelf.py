"""Models beside the first one: opened when a request names them, and closed when another needs the place or nobody asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.errors import BessemerError
from bessemer.serving.bodies import ApiError
from bessemer.serving.worker import TextEngine, Worker

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
        """API requests of all of them that are under way."""
        return sum(one.worker.requests for one in self._open.values())

    async def model(self, name: str) -> OpenModel:
        """A model that is open, opened if it must be. Nothing is awaited where it is, so that a request that has it may be
        admitted before anybody closes it.

        Raises ApiError: 503 where no place is free, or the model cannot be opened.
        """
        if (found := self._usable(name)) is not None:
            return found
        async with self._opening:
            if (found := self._usable(name)) is not None:
                return found
            size = size_of(self._places[name])
            self._make_room(name, size)
            try:
                engine = await asyncio.to_thread(self._open_engine, self._places[name])
            except BessemerError as error:
                raise ApiError(
                    f"the model '{name}' cannot be opened: {_without_place(error, self._places[name])}",
                    status=503,
                    kind="server_error",
                    headers={"Retry-After": "30"},
                ) from None
            found = OpenModel(name, engine, Worker(engine, self._max_waiting), size, self._clock())
            self._open[name] = found
            return found

    def drain(self) -> None:
        """Begin nothing new."""
        self.is_draining = True
        for one in self._open.values():
            one.worker.is_draining = True

    def close_idle(self) -> None:
        """Close what nobody has asked for in the time that is kept."""
        if self._keep_alive is None:
            return
        for one in self.open_models:
            if one.worker.requests == 0 and self._clock() - one.used >= self._keep_alive:
                self._close(one)

    def close(self) -> None:
        """Close all."""
        for one in self.open_models:
            self._close(one)

    def _usable(self, name: str) -> OpenModel | None:
        found = self._open.get(name)
        if found is not None and found.worker.failure is not None and found.worker.requests == 0:
            # one that has failed is opened again
            self._close(found)
            return None
        if found is not None:
            found.used = self._clock()
        return found

    def _make_room(self, name: str, size: int) -> None:
        """Close the models that were asked for the longest time ago until another fits. Raises ApiError (503)."""
        if self.is_draining:
            raise _busy("the server is stopping; another one may answer")
        if self._memory is not None and size > self._memory:
            raise ApiError(
                f"the model '{name}' is larger than the memory for models: {size / _GIB:.1f} of {self._memory / _GIB:.1f} GiB",
                status=503,
                kind="server_error",
            )
        while not self._fits(size):
            idle = [one for one in self._open.values() if one.worker.requests == 0]
            if not idle:
                raise _busy(f"no place is free for '{name}' while the other models answer; try again in a moment")
            self._close(min(idle, key=lambda one: one.used))

    def _fits(self, size: int) -> bool:
        held = sum(one.size for one in self._open.values())
        return len(self._open) < self._most and (self._memory is None or held + size <= self._memory)

    def _close(self, one: OpenModel) -> None:
        del self._open[one.name]
        one.close()


def size_of(place: Path) -> int:
    """Bytes of a model's weights on disk."""
    if place.is_file():
        return place.stat().st_size
    return sum(path.stat().st_size for path in place.glob("*.safetensors"))


def _without_place(error: BessemerError, place: Path) -> str:
    """The error, without where the model lies on this machine."""
    return str(error).replace(str(place), place.name)


def _busy(reason: str) -> ApiError:
    return ApiError(reason, status=503, kind="server_error", code="server_overloaded", headers={"Retry-After": "1"})
