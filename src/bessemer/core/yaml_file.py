"""YAML 1.2 read with the place of every key, so that a mistake is named by file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError

#: A key's path inside a file: ("pretrain", "steps"), ("collect", 0, "lock").
KeyPath = tuple[str | int, ...]

#: Errors that ruamel raises as they are when a text does not fit its tag: `!!int abc`, `!!bool abc`, `!!omap abc`, 2020-13-45.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: Characters of an unreadable value that a message shows.
_SHOWN = 40


@dataclass(frozen=True)
class Location:
    """Where a value is written: a line of a file, or an override on the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class PlacedValues:
    """Plain values with the place of every key that was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Location] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Location:
        """The place of a key, or of the nearest key around it that was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Location("recipe")

    def where(self, section: KeyPath, path: KeyPath = ()) -> str:
        """A key named for an error: `recipe.yaml:12: pretrain.steps`. A line break in a key is escaped."""
        whole = section + path
        names = [name if name.isprintable() else repr(name) for name in map(str, whole)]
        return f"{self.place(whole)}: {'.'.join(names)}" if whole else str(self.place(whole))

    def merged(self, over: PlacedValues) -> PlacedValues:
        """These values with another's on top: mappings merge key by key, anything else is replaced whole."""
        values = dict(self.values)
        places = dict(self.places)
        _merge(values, over.values, (), places, over.places)
        return PlacedValues(values, places)


def read_yaml(path: Path) -> PlacedValues:
    """Read a mapping. An empty file, or one of comments, has no keys.

    Raises ConfigError with file and line for a syntax error, a key given twice, a value that is not of its tag, or another
    type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> PlacedValues:
    """As `read_yaml`, from text; `source` names it in errors."""
    values, places = _load(text, source)
    if values is None:
        return PlacedValues({}, places)
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: this must be a mapping of keys to values, it is a {type(values).__name__}")
    return PlacedValues(values, places)


def parse_value(text: str, source: str) -> Any:
    """One YAML value, as in `KEY=VALUE`."""
    return _load(text, source)[0]


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML 1.2 text."""
    from ruamel.yaml import YAML

    stream = StringIO()
    writer = YAML(typ="safe")
    writer.default_flow_style = None
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 120
    writer.dump(values, stream)
    return stream.getvalue()


def _load(text: str, source: str) -> tuple[Any, dict[KeyPath, Location]]:
    """A text's value as plain Python, and the places of its keys and items."""
    places: dict[KeyPath, Location] = {(): Location(source, 1)}
    try:
        return _plain(_constructed(text, source), source, (), places), places
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply") from None


def _constructed(text: str, source: str) -> Any:
    """ruamel's value of a text, with lines."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="rt")
    reader.Constructor = _located_constructor()
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = (error.problem or "cannot be read").splitlines()[0]
        if "'\\t'" in problem:
            problem = "a tab stands where YAML takes spaces only; indent with spaces"
        raise ConfigError(f"{source}{line}: not valid YAML: {problem}") from None
    except (YAMLError, *_UNREADABLE) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(f"{source}: not valid YAML: {problem or type(error).__name__}") from None


@cache
def _located_constructor() -> type:
    """ruamel's constructor, with the line of a value that it cannot construct in the error."""
    from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
    from ruamel.yaml.nodes import Node

    class LocatedConstructor(RoundTripConstructor):
        def construct_object(self, node: Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except _UNREADABLE:
                shown = node.value if isinstance(node.value, str) else "a collection"
                shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
                problem = f"{shown!r} cannot be read as {str(node.tag).rpartition(':')[2]}"
                raise ConstructorError(None, None, problem, node.start_mark) from None

    return LocatedConstructor


def _plain(value: Any, source: str, path: KeyPath, places: dict[KeyPath, Location]) -> Any:
    """ruamel's value as plain Python, noting the line of each key and item below it."""
    if hasattr(value, "lc") and hasattr(value, "keys"):
        result = {}
        for key in value:
            child = (*path, str(key))
            places[child] = _place(value, key, source)
            result[str(key)] = _plain(value[key], source, child, places)
        return result
    if isinstance(value, list):
        items = []
        for index, item in enumerate(value):
            child = (*path, index)
            places[child] = _place(value, index, source)
            items.append(_plain(item, source, child, places))
        return items
    if isinstance(value, bool) or value is None:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    # a date: no setting is one, so it was meant as a word
    return str(value)


def _place(collection: Any, key: Any, source: str) -> Location:
    """The place of a key or an item; without a line where ruamel knows none, as for keys that are merged from elsewhere."""
    lines = getattr(getattr(collection, "lc", None), "data", None) or {}
    return Location(source, lines[key][0] + 1 if key in lines else None)


def _merge(
    values: dict[str, Any],
    over: dict[str, Any],
    path: KeyPath,
    places: dict[KeyPath, Location],
    over_places: dict[KeyPath, Location],
) -> None:
    for key, value in over.items():
        child = (*path, key)
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = dict(values[key])
            _merge(values[key], value, child, places, over_places)
            if child in over_places:
                places[child] = over_places[child]
            continue
        values[key] = value
        for known in [known for known in places if known[: len(child)] == child]:
            del places[known]
        places.update({known: place for known, place in over_places.items() if known[: len(child)] == child})
