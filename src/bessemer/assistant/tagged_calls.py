"""Calls in tags, argument by argument, as Qwen3-Coder writes them.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    value
    </parameter>
    </function>
    </tool_call>

A value has no quotation marks: whether `3` is a number or a text is for the schema to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bessemer.assistant.grammar import ANY_TEXT, OfferedTool, Rules, literal
from bessemer.assistant.json_calls import ParsedCall, Schemas, read_value

_FUNCTION = re.compile(r"\s*<function=([^>]*)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>\n?(.*?)(?:\n?</parameter>|\Z)", re.DOTALL)
_TEXT = {"type": "string"}


def read_tagged_calls(body: str, schemas: Schemas) -> list[ParsedCall]:
    """The call of a body. Raises ValueError."""
    found = _FUNCTION.fullmatch(body)
    if found is None:
        raise ValueError("must be <function=NAME> with its parameters")
    name, inner = found[1].strip(), found[2]
    if not name:
        raise ValueError("has no name")
    properties = schemas.get(name, {}).get("properties", {})
    arguments: dict[str, Any] = {}
    place = 0
    while inner[place:].strip():
        parameter = _PARAMETER.match(inner, place)
        if parameter is None:
            raise ValueError(f"what follows is no parameter: {inner[place:].strip()[:60]!r}")
        key = parameter[1].strip()
        arguments[key] = _value(parameter[2], properties.get(key, _TEXT) if isinstance(properties, Mapping) else _TEXT)
        place = parameter.end()
    return [ParsedCall(name, arguments)]


def _value(text: str, schema: Any) -> Any:
    """A value as its schema has it: a text as it is where it may be one, else JSON where it is some."""
    if _is_text(schema):
        return text
    try:
        return read_value(text.strip())
    except ValueError:
        return text


def _is_text(schema: Any) -> bool:
    """Whether a schema allows texts alone."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def tagged_arguments(rules: Rules, tool: OfferedTool) -> str:
    """The grammar of a call between its tags: the schema's properties in their order, of which those that it does not require
    may be left out."""
    properties = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", ())
    parts = [literal(f"<function={tool.name}>\n")]
    for key, schema in properties.items():
        begin, end = literal(f"<parameter={key}>\n"), "\n</parameter>\n"
        if _is_text(schema) and "enum" not in schema:
            value = rules.add(ANY_TEXT, f"[suffix={literal(end)}]")
        elif _is_text(schema):
            value = f"{rules.add(' | '.join(map(literal, schema['enum'])))} {literal(end)}"
        else:
            # what it refers to stands in the whole
            own = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
            value = f"{rules.json({**own, **schema} if isinstance(schema, Mapping) else schema)} {literal(end)}"
        part = rules.add(f"{begin} {value}")
        parts.append(part if key in required else f"{part}?")
    return " ".join([*parts, literal("</function>")])
