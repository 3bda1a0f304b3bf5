"""Scores and edits by the names that recipes use. A filter's module is imported when it is asked for: some load models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import pyarrow as pa

from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.text.texts import Texts


@dataclass(frozen=True)
class Scorer:
    """A pure function from texts to score columns, and which columns those are."""

    name: str
    columns: Mapping[str, pa.DataType]
    function: Callable[[Texts], Mapping[str, pa.Array]]


@dataclass(frozen=True)
class Edit:
    """A pure function from texts to other texts and columns that count what was changed."""

    name: str
    columns: Mapping[str, pa.DataType]
    function: Callable[[Texts], tuple[pa.Array, Mapping[str, pa.Array]]]


_FILTERS, _EDITS = "bessemer.data.filters", "bessemer.data.edits"
#: Where a function lies in a module of another name than its own.
_ELSEWHERE = {"gopher_quality": "gopher", "c4_terminal_lines": "c4_lines"}


def scorer(name: str, folder: Path = Path()) -> Scorer:
    """The scorer of a name, or of a user's `file.py:function`. Raises ConfigError when such a function cannot be loaded."""
    if is_user_function(name):
        column = name.rpartition(":")[2]
        function = load_user_function(name, folder)
        return Scorer(column, {column: pa.float64()}, partial(_user_scores, function, name, column))
    module = import_module(f"{_FILTERS}.{_ELSEWHERE.get(name, name)}")
    function = getattr(module, name)
    if "Texts" not in function.__annotations__["texts"]:
        return Scorer(name, module.COLUMNS, lambda texts: function(texts.array))
    return Scorer(name, module.COLUMNS, function)


def edit(name: str, folder: Path = Path()) -> Edit:
    """The edit of a name, or of a user's `file.py:function`. Raises ConfigError when such a function cannot be loaded."""
    if is_user_function(name):
        return Edit(name.rpartition(":")[2], {}, partial(_user_edit, load_user_function(name, folder), name))
    module = import_module(f"{_EDITS}.{_ELSEWHERE.get(name, name)}")
    return Edit(name, module.COLUMNS, getattr(module, name))


def _user_scores(function: Callable[[pa.Array], Iterable[float]], name: str, column: str, texts: Texts) -> dict[str, pa.Array]:
    found = _called(function, name, texts, "scores", "one number per text is needed")
    try:
        return {column: found.cast(pa.float64())}
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{name}: its scores are not numbers ({error})") from None


def _user_edit(function: Callable[[pa.Array], Iterable[str]], name: str, texts: Texts) -> tuple[pa.Array, dict[str, pa.Array]]:
    found = _called(function, name, texts, "texts", "one text per text is needed")
    if found.null_count or not (pa.types.is_string(found.type) or pa.types.is_large_string(found.type)):
        raise ConfigError(f"{name}: it returned {found.type}; an edit returns a string for each text")
    return found.cast(pa.string()), {}


def _called(function: Callable[[pa.Array], Iterable], name: str, texts: Texts, what: str, needed: str) -> pa.Array:
    try:
        found = function(texts.array)
        result = found if isinstance(found, (pa.Array, pa.ChunkedArray)) else pa.array(list(found))
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    if len(result) != len(texts):
        raise ConfigError(f"{name}: it returned {len(result)} {what} for {len(texts)} texts; {needed}")
    return result.combine_chunks() if isinstance(result, pa.ChunkedArray) else result
