"""Registry: the implementations that a recipe may name, our own and those of other packages.

A `Plugin` describes an implementation: its name, a line about it, its settings, and its code. The code is imported when it is
first used, so that a recipe is checked without it. Other packages add plugins by an entry point
whose object is a `Plugin`:

    [project.entry-points."bessemer.filters"]
    shouting = "my_package.shouting:PLUGIN"
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from bessemer.core.config import Config, nearest
from bessemer.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin(Generic[T]):
    """An implementation with its name, a line that describes it, and the settings that it reads.

    implementation: the object itself, or `module:attribute`, which is imported by `load`.
    """

    name: str
    description: str
    implementation: T | str
    settings: type[Config] | None = None

    def load(self) -> T:
        """The implementation. Raises ImportError when its module needs a package that is not installed."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, attribute = self.implementation.partition(":")
        return cast(T, getattr(import_module(module), attribute))


def _entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group. Every installed package is read for them, so it is done once for each `sys.path`."""
    return _entries_on(group, tuple(sys.path))


@lru_cache(maxsize=128)
def _entries_on(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


class Registry(Mapping[str, Plugin[T]]):
    """Plugins of one kind by name: our own in their order, then those that installed packages add.

    kind: the word for one in messages. group: the entry points' group. Entry points are listed only for a name that is not our
    own, or for all names; a module is imported when its plugin is looked up.
    """

    def __init__(self, kind: str, group: str, plugins: Iterable[Plugin[T]]) -> None:
        self.kind = kind
        self.group = group
        self._own = {plugin.name: plugin for plugin in plugins}

    @property
    def _others(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in _entries(self.group) if entry.name not in self._own}

    def __getitem__(self, name: str) -> Plugin[T]:
        if name in self._own:
            return self._own[name]
        try:
            plugin = self._others[name].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the entry point {name!r} of {self.group} cannot be loaded: {error}") from error
        if not isinstance(plugin, Plugin) or plugin.name != name:
            raise ConfigError(f"the entry point {name!r} of {self.group} is not a Plugin of that name")
        return plugin

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._others

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def find(self, name: str) -> Plugin[T]:
        """The plugin of a name. Raises ConfigError, with the nearest name, when there is none."""
        if name not in self:
            raise ConfigError(f"there is no {self.kind} {name!r}{nearest(name, list(self))}")
        return self[name]


def plugin_versions(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Package and version of the plugins that other packages add, for the key of a stage: its output depends on them.

    named: (group, name) of plugins. Our own have no entry.
    """
    versions: dict[str, str] = {}
    wanted = set(named)
    for group in sorted({group for group, _ in wanted}):
        for entry in _entries(group):
            if (group, entry.name) in wanted:
                package = entry.dist
                versions[f"{group}:{entry.name}"] = f"{package.name} {package.version}" if package else entry.value
    return versions
