"""The adapters that requests may name."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from bessemer.core.errors import RequestError
from bessemer.model.adapters import Adapter


class LoadedAdapter(NamedTuple):
    """An adapter; salt: keeps its pages apart from others', and from those of one that had its name before."""

    adapter: Adapter
    salt: str


class LoadedAdapters:
    """Names and what they stand for now. An answer keeps the adapter that it began with."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._generations = count()

    @property
    def names(self) -> tuple[str, ...]:
        """What `find` knows."""
        return tuple(self._loaded)

    def load(self, name: str, adapter: Adapter) -> None:
        """Let a name stand for an adapter from now on."""
        self._loaded[name] = LoadedAdapter(adapter, f"adapter {name} {next(self._generations)}")

    def unload(self, name: str) -> None:
        """Forget a name. Raises RequestError where it is not loaded."""
        self.find(name)
        del self._loaded[name]

    def find(self, name: str) -> LoadedAdapter:
        """What a name stands for. Raises RequestError where it is not loaded."""
        if name not in self._loaded:
            known = f"loaded: {', '.join(self._loaded)}" if self._loaded else "none is loaded"
            raise RequestError(f"unknown adapter {name!r}; {known}")
        return self._loaded[name]
