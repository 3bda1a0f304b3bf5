"""Calls of tools that are written in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

#: JSON schemas of the arguments of tools, by the tools' names.
Schemas = Mapping[str, Mapping[str, Any]]


class ParsedCall(NamedTuple):
    """A call as it was written."""

    name: str
    arguments: dict[str, Any]


def checked_call(name: str, arguments: dict[str, Any]) -> ParsedCall:
    """A call. Raises ValueError for text that has no UTF-8: no template could write it."""
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is no character") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    return ParsedCall(name, arguments)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def read_value(text: str) -> Any:
    """A value in JSON, which has no NaN. Raises ValueError, also for what is nested too deep."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_calls(body: str, schemas: Schemas | None = None) -> list[ParsedCall]:
    """Calls in JSON: objects with `name` and `arguments` or `parameters`, alone, in a list, or several apart by `;`.

    Arguments may be a text that is JSON itself, as chat completions write them. Raises ValueError.
    """
    calls: list[ParsedCall] = []
    place = 0
    try:
        while place < len(body):
            if body[place].isspace() or body[place] == ";":
                place += 1
                continue
            value, place = _DECODER.raw_decode(body, place)
            calls += [_as_call(one) for one in (value if isinstance(value, list) else [value])]
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not calls:
        raise ValueError("empty")
    return calls


def read_named_call(name: str, arguments: str) -> ParsedCall:
    """A call whose name stands apart from its arguments in JSON. Raises ValueError."""
    if not name:
        raise ValueError("has no name")
    value = read_value(arguments) if arguments.strip() else {}
    if not isinstance(value, dict):
        raise ValueError(f"the arguments must be an object, got {json.dumps(value)[:60]}")
    return checked_call(name, value)


def _as_call(value: Any) -> ParsedCall:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with name and arguments, got {json.dumps(value)[:60]}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("has no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_value(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments must be an object, got {json.dumps(arguments)[:60]}")
    return checked_call(name, arguments)
