"""Messages as a model writes them: the inverse of the parser, for what a template leaves out of the turns that are trained on.

A writer of calls gives pieces, some of which are tags: control tokens, where the tokenizer has them so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bessemer.assistant.messages import BadCall, Message, TextDelta, ThinkingDelta
from bessemer.assistant.parser import MessageParser, ParsedCall, Schemas


class Piece(NamedTuple):
    """A part of a written message."""

    text: str
    is_tag: bool = False


#: Pieces of calls, given whether a text comes before them.
CallWriter = Callable[[Sequence[ParsedCall], bool], list[Piece]]


def in_json(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def in_tags(opening: str, closing: str, body: Callable[[ParsedCall], str]) -> CallWriter:
    """A writer of calls between tags, each on lines of its own."""

    def write(calls: Sequence[ParsedCall], has_text: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for call in calls:
            between = "\n" if pieces or has_text else ""
            pieces += [Piece(between), Piece(opening, True), Piece(body(call)), Piece(closing, True)]
        return pieces

    return write


def json_body(call: ParsedCall) -> str:
    """A call as Hermes models write it between tags."""
    return f'\n{{"name": {in_json(call.name)}, "arguments": {in_json(call.arguments)}}}\n'


def parameters_body(call: ParsedCall) -> str:
    """A call as Qwen3-Coder writes it between tags: each argument in tags."""
    values = "".join(f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in call.arguments.items())
    return f"\n<function={call.name}>\n{values}</function>\n"


def glm_body(call: ParsedCall) -> str:
    """A call as GLM writes it between tags: names and values of the arguments in tags."""
    values = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{_bare(value)}</arg_value>\n" for key, value in call.arguments.items()
    )
    return f"{call.name}\n{values}"


def _bare(value: Any) -> str:
    """A text as it is, another value in JSON."""
    return value if isinstance(value, str) else in_json(value)


def write_llama3(calls: Sequence[ParsedCall], has_text: bool) -> list[Piece]:
    """JSON alone, or behind a tag where a text comes before it."""
    objects = "; ".join(f'{{"name": {in_json(call.name)}, "parameters": {in_json(call.arguments)}}}' for call in calls)
    return [*([Piece("<|python_tag|>", True)] if has_text else []), Piece(objects)]


def write_mistral(calls: Sequence[ParsedCall], has_text: bool) -> list[Piece]:
    """A list in JSON."""
    return [Piece("[TOOL_CALLS]", True), Piece(in_json([{"name": call.name, "arguments": call.arguments} for call in calls]))]


def write_mistral_named(calls: Sequence[ParsedCall], has_text: bool) -> list[Piece]:
    """A name and its arguments, behind tags."""
    return [
        piece
        for call in calls
        for piece in (
            Piece("[TOOL_CALLS]", True),
            Piece(call.name),
            Piece("[ARGS]", True),
            Piece(in_json(call.arguments)),
        )
    ]


#: Tags of DeepSeek's calls.
DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end"))


def write_deepseek(*, fenced: bool) -> CallWriter:
    """A writer of DeepSeek's calls. fenced: JSON within ``` behind a kind, as until V3.1."""

    def write(calls: Sequence[ParsedCall], has_text: bool) -> list[Piece]:
        begin, end, call_begin, separator, call_end = (Piece(tag, True) for tag in DEEPSEEK)
        pieces = [begin]
        for number, call in enumerate(calls):
            arguments = in_json(call.arguments)
            if fenced:
                # further calls begin a line
                pieces += [Piece("\n" if number else ""), call_begin, Piece("function"), separator]
                pieces += [Piece(f"{call.name}\n```json\n{arguments}\n```"), call_end]
            else:
                pieces += [call_begin, Piece(call.name), separator, Piece(arguments), call_end]
        return [*pieces, end]

    return write


def calls_of(message: Message) -> list[ParsedCall]:
    """The calls of a message as the parser gives them."""
    return [ParsedCall(call.name, dict(call.arguments)) for call in message.calls]


def schemas_of(tools: Sequence[Mapping[str, Any]], message: Message) -> Schemas:
    """Schemas of the arguments for the parser; a tool that is called and not described allows anything."""
    functions = [tool.get("function", tool) for tool in tools]
    described = {str(one["name"]): one.get("parameters") or {} for one in functions}
    return {call.name: {} for call in message.calls} | described


def reads_back(written: str, message: Message, parser: MessageParser) -> bool:
    """Whether a new parser reads a text as this message: thinking, text and calls, but for white space around them."""
    thinking, text, calls = "", "", []
    for event in [*parser.feed(written), *parser.finish()]:
        match event:
            case ThinkingDelta(said):
                thinking += said
            case TextDelta(said):
                text += said
            case BadCall():
                return False
            case ParsedCall():
                calls.append(event)
    return (thinking.strip(), text.strip(), calls) == (message.thinking.strip(), message.text.strip(), calls_of(message))
