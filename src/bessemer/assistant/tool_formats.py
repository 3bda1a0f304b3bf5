"""How models write calls of tools: a format is data, and others are added by entry points of `bessemer.tool_formats`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bessemer.core.registry import Plugin, Registry


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


class ParsedCall(NamedTuple):
    """A call as it was written."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in a message.

    opening, closing: the tags around a body; without a closing one the body goes on to the message's end. read: the calls of a
    body, at least one; ValueError says what is wrong with it. is_bare: whether a message that begins with `{` may be a body as
    a whole, without tags.
    """

    opening: str
    closing: str | None
    read: Callable[[str], list[ParsedCall]]
    is_bare: bool = False


def read_json_calls(body: str) -> list[ParsedCall]:
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


def _as_call(value: Any) -> ParsedCall:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with name and arguments, got {json.dumps(value)[:60]}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("has no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments must be an object, got {json.dumps(arguments)[:60]}")
    return ParsedCall(name, arguments)


_OWN: list[Plugin[ToolFormat]] = [
    Plugin(
        "hermes",
        "`<tool_call>{JSON}</tool_call>`: ours, Hermes, Qwen",
        ToolFormat("<tool_call>", "</tool_call>", read_json_calls),
    ),
    Plugin(
        "llama3",
        "`<|python_tag|>{JSON}`, or JSON alone: Llama 3.1 and later",
        ToolFormat("<|python_tag|>", None, read_json_calls, is_bare=True),
    ),
    Plugin("mistral", "`[TOOL_CALLS][{JSON}, …]`: Mistral", ToolFormat("[TOOL_CALLS]", None, read_json_calls)),
]

TOOL_FORMATS: Registry[ToolFormat] = Registry("tool format", "bessemer.tool_formats", _OWN)


def format_of_template(chat_template: str | None) -> ToolFormat:
    """The first format of ours whose opening tag stands in a chat template; else that of Hermes."""
    own = [plugin.load() for plugin in _OWN]
    return next((one for one in own if chat_template is not None and one.opening in chat_template), own[0])
