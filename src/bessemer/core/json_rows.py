"""Rows in a value of JSON: a list, a list under a key, or an object of columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from bessemer.core.config import nearest

#: Between the name of a file and the part of it that is meant: a workbook's sheet, a key of JSON.
PART = "#"


def json_values(text: str) -> list[Any]:
    """The values of JSON that stand one behind the other. Raises ValueError, also for a value nested too deeply."""
    decoder, values, place = json.JSONDecoder(), [], 0
    try:
        while (begin := _NOT_BLANK.search(text, place)) is not None:
            value, place = decoder.raw_decode(text, begin.start())
            values.append(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return values


_NOT_BLANK = re.compile(r"[^\s\ufeff]")


def rows_in(value: Any, part: str, file: str, notes: list[str]) -> list[Any]:
    """The list of rows in a JSON value: itself, under a key, or the columns of an object.

    part: keys that lead to it, joined by dots, where somebody named it. file: its name, for messages. notes: receives where the
    rows stand. Raises ValueError, to stand behind the file's name, where several lists could be meant, or none.
    """
    if part:
        for key in part.split("."):
            if not isinstance(value, dict) or key not in value:
                known = nearest(key, list(value)) if isinstance(value, dict) else ""
                raise ValueError(f"has no key {key!r}{known}")
            value = value[key]
    if isinstance(value, list):
        return _unwrapped(value)
    if isinstance(value, dict):
        found = {name: inner for name, inner in _lists(value).items() if any(isinstance(one, dict) for one in inner)}
        of_turns = [name for name, inner in found.items() if {"role", "from"} & set(next(filter(_is_object, inner)))]
        if of_turns:
            # the messages of one conversation, not rows
            return [value]
        if len(found) == 1:
            ((name, rows),) = found.items()
            notes.append(f"the rows stand under the key {name!r}")
            return _unwrapped(rows)
        if found:
            names = " or ".join(f"{file}{PART}{name}" for name in found)
            raise ValueError(f"holds several lists of rows; name the one that is meant, as {names}")
        if (columns := _columns(value)) is not None:
            notes.append("columns as lists")
            return columns
    raise ValueError(
        f"must be a list of objects, it is a {type(value).__name__}; one object a line is .jsonl, and a list "
        "under a key is found"
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _lists(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists under the keys of an object, and one level below, by their keys joined by a dot."""
    lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
    for name, inner in value.items():
        if isinstance(inner, dict):
            lists |= {f"{name}.{key}": below for key, below in inner.items() if isinstance(below, list)}
    return lists


def _unwrapped(rows: list[Any]) -> list[Any]:
    """Rows without the object around each that the hub's viewer writes: {"row_idx": 0, "row": {…}}."""
    if rows and all(isinstance(one, dict) and isinstance(one.get("row"), dict) and "row_idx" in one for one in rows):
        return [one["row"] for one in rows]
    return rows


def _columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of an object of columns, of which each is a list, or an object by the row's number, as pandas writes them."""
    cells = [[*one.values()] if isinstance(one, dict) else one for one in value.values()]
    if not cells or not all(isinstance(one, list) and one for one in cells) or len({len(one) for one in cells}) > 1:
        return None
    numbered = [set(one) for one in value.values() if isinstance(one, dict)]
    if numbered and (len(numbered) < len(cells) or any(one != numbered[0] for one in numbered)):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
