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
from collections.abc import Iterator, Mapping
from typing import Any

from bessemer.assistant.grammar import ANY_TEXT, OfferedTool, Rules, literal
from bessemer.assistant.json_calls import ParsedCall, Schemas, checked_call, read_value

_FUNCTION = re.compile(r"\s*<function=([^>]*)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>\n?(.*?)(?:\n?</parameter>|\Z)", re.DOTALL)
_TEXT = {"type": "string"}
#: Words of Python that models write where JSON has others.
_PYTHON = {"True": True, "False": False, "None": None}
#: References and unions within each other that are followed, and schemas that are looked at for a value: a schema may refer to
#: itself.
_DEEPEST, _MOST = 16, 1000


def read_tagged_calls(body: str, schemas: Schemas) -> list[ParsedCall]:
    """The call of a body. Raises ValueError."""
    found = _FUNCTION.fullmatch(body)
    if found is None:
        raise ValueError("must be <function=NAME> with its parameters")
    name, inner = found[1].strip(), found[2]
    if not name:
        raise ValueError("has no name")
    whole = schemas.get(name, {})
    properties = whole.get("properties", {})
    arguments: dict[str, Any] = {}
    place = 0
    while inner[place:].strip():
        parameter = _PARAMETER.match(inner, place)
        if parameter is None:
            raise ValueError(f"what follows is no parameter: {inner[place:].strip()[:60]!r}")
        key = parameter[1].strip()
        arguments[key] = _value(parameter[2], properties.get(key, _TEXT) if isinstance(properties, Mapping) else _TEXT, whole)
        place = parameter.end()
    return [checked_call(name, arguments)]


def _value(text: str, schema: Any, whole: Mapping[str, Any]) -> Any:
    """A value as its schema has it: the text where it must be one, else the first reading that fits. Where none does, it is
    JSON if it can be. whole: what the schema refers into."""
    if _is_text(schema):
        return text
    readings = list(_readings(text))
    return next((value for value in readings if _Fit(whole).allows(value, schema)), readings[0])


def _readings(text: str) -> Iterator[Any]:
    """What a text may mean: JSON, a word of Python, itself."""
    try:
        yield read_value(text.strip())
    except ValueError:
        pass
    if text.strip() in _PYTHON:
        yield _PYTHON[text.strip()]
    yield text


class _Fit:
    """Whether a value is of a kind that a schema allows: by its types, `enum` and `const`, through unions and references.

    Patterns and what is inside lists and objects are for the tool to check, in its time limit.
    """

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._looks = 0

    def allows(self, value: Any, schema: Any, depth: int = 0) -> bool:
        """Whether this schema does, as far as it is followed."""
        self._looks += 1
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping) or depth > _DEEPEST or self._looks > _MOST:
            return True
        kinds = schema.get("type", ())
        kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
        if kinds and not any(_is_of(value, kind) for kind in kinds):
            return False
        if "enum" in schema and not any(_is_same(value, one) for one in schema["enum"]):
            return False
        if "const" in schema and not _is_same(value, schema["const"]):
            return False
        all_of = [*schema.get("allOf", ())]
        if "$ref" in schema:
            all_of.append(_referred(schema["$ref"], self._whole))
        return all(self.allows(value, one, depth + 1) for one in all_of) and all(
            any(self.allows(value, one, depth + 1) for one in schema[key]) for key in ("anyOf", "oneOf") if key in schema
        )


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of JSON schema; an unknown one allows all."""
    kinds: tuple[str, ...]
    match value:
        case None:
            kinds = ("null",)
        case bool():
            kinds = ("boolean",)
        case int():
            kinds = ("integer", "number")
        case float():
            kinds = ("integer", "number") if value.is_integer() else ("number",)
        case str():
            kinds = ("string",)
        case list():
            kinds = ("array",)
        case _:
            kinds = ("object",)
    return kind in kinds or kind not in ("null", "boolean", "integer", "number", "string", "array", "object")


def _is_same(value: Any, other: Any) -> bool:
    """Whether values of JSON are equal; True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _referred(reference: Any, whole: Mapping[str, Any]) -> Any:
    """What a reference within the schema leads to; True where that is nothing, or elsewhere."""
    found: Any = whole
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or step not in found:
            return True
        found = found[step]
    return found


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
