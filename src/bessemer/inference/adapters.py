"""Low-rank adapters that requests may name."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from bessemer.core.errors import RequestError
from bessemer.model.adapters import Adapter


class LoadedAdapter(NamedTuple):
    """An adapter; salt: keeps its KV blocks apart from others', and from those of an earlier adapter of the same name."""

    adapter: Adapter
    salt: str


class LoadedAdapters:
    """Names and their adapters. A request keeps the adapter that it began with."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._generations = count()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are loaded."""
        return tuple(self._loaded)

    def load(self, name: str, adapter: Adapter) -> None:
        """Give a name to an adapter; one that has the name already is replaced."""
        self._loaded[name] = LoadedAdapter(adapter, f"adapter {name} {next(self._generations)}")

    def unload(self, name: str) -> None:
        """Remove a name. Raises RequestError where it is not loaded."""
        self.find(name)
        del self._loaded[name]

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of a name. Raises RequestError where it is not loaded."""
        if name not in self._loaded:
            known = f"loaded: {', '.join(self._loaded)}" if self._loaded else "none is loaded"
            raise RequestError(f"unknown adapter {name!r}; {known}")
        return self._loaded[name]
