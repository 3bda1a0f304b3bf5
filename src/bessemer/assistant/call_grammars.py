"""Grammars of calls of tools, by format: what may come after the first opening tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.assistant.grammar import ANY_TEXT, SPACE, OfferedTool, Rules, literal
from bessemer.assistant.written import DEEPSEEK

_LINE = literal("\n")


def _objects(rules: Rules, tools: Sequence[OfferedTool], arguments: str = "arguments") -> str:
    """A call of one of the tools as a JSON object. arguments: the key of the arguments."""
    calls = []
    for tool in tools:
        beginning = f'{{"name": {literal(tool.name)}, "{arguments}": '
        calls.append(f"{literal(beginning)} {rules.json(tool.parameters)} {literal('}')}")
    return rules.add(" | ".join(calls))


def _repeated(first: str, again: str, in_parallel: bool) -> str:
    return f"{first} ({again})*" if in_parallel else first


def hermes_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Objects in JSON, each between tags."""
    call = f"{_LINE} {_objects(rules, tools)} {_LINE} {rules.tag('</tool_call>')}"
    return _repeated(call, f"{SPACE} {rules.tag('<tool_call>')} {call}", in_parallel)


def llama3_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Objects in JSON, separated by `;`."""
    call = _objects(rules, tools, "parameters")
    return _repeated(call, f"{literal('; ')} {call}", in_parallel)


def mistral_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """A list in JSON."""
    call = _objects(rules, tools)
    calls = _repeated(call, f"{literal(', ')} {call}", in_parallel)
    return f"{literal('[')} {calls} {literal(']')}"


def mistral_named_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Names, each with its arguments in JSON."""
    call = rules.add(" | ".join(f"{literal(tool.name)} {rules.tag('[ARGS]')} {rules.json(tool.parameters)}" for tool in tools))
    return _repeated(call, f"{rules.tag('[TOOL_CALLS]')} {call}", in_parallel)


def tagged_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Qwen3-Coder's calls."""
    call = rules.add(" | ".join(tagged_arguments(rules, tool) for tool in tools))
    call = f"{_LINE} {call} {_LINE} {rules.tag('</tool_call>')}"
    return _repeated(call, f"{SPACE} {rules.tag('<tool_call>')} {call}", in_parallel)


def glm_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """GLM's calls."""
    call = rules.add(" | ".join(_keyed_arguments(rules, tool) for tool in tools))
    call = f"{call} {rules.tag('</tool_call>')}"
    return _repeated(call, f"{SPACE} {rules.tag('<tool_call>')} {call}", in_parallel)


def _keyed_arguments(rules: Rules, tool: OfferedTool) -> str:
    """As `tagged_arguments`, for GLM."""
    required = tool.parameters.get("required", ())
    parts = [literal(f"{tool.name}\n")]
    for key, schema in tool.parameters.get("properties", {}).items():
        begin, end = f"{rules.tag('<arg_key>')} {literal(key)} {rules.tag('</arg_key>')} {_LINE}", rules.tag("</arg_value>")
        if is_text(schema) and "enum" not in schema:
            value = rules.up_to("</arg_value>")
        elif is_text(schema):
            value = f"{rules.add(' | '.join(map(literal, schema['enum'])))} {end}"
        else:
            # targets of its `$ref`s are in the whole schema
            own = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
            value = f"{rules.json({**own, **schema} if isinstance(schema, Mapping) else schema)} {end}"
        part = rules.add(f"{begin} {rules.tag('<arg_value>')} {value} {_LINE}")
        parts.append(part if key in required else f"{part}?")
    return " ".join(parts)


def deepseek_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Calls of DeepSeek until V3.1: JSON within ```."""
    _, end, begin, separator, call_end = map(rules.tag, DEEPSEEK)
    fence = literal("\n```")
    call = rules.add(
        " | ".join(
            f"{begin} {literal('function')} {separator} {literal(f'{tool.name}{_JSON_FENCE}')} {rules.json(tool.parameters)} "
            f"{fence} {call_end}"
            for tool in tools
        )
    )
    return f"{_repeated(call, f'{_LINE} {call}', in_parallel)} {end}"


def deepseek_v31_calls(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    """Calls of DeepSeek-V3.1."""
    _, end, begin, separator, call_end = map(rules.tag, DEEPSEEK)
    call = rules.add(
        " | ".join(f"{begin} {literal(tool.name)} {separator} {rules.json(tool.parameters)} {call_end}" for tool in tools)
    )
    return f"{_repeated(call, call, in_parallel)} {end}"


#: What DeepSeek writes before arguments.
_JSON_FENCE = "\n```json\n"


def tagged_arguments(rules: Rules, tool: OfferedTool) -> str:
    """The grammar of a call between its tags: the schema's properties in their order; optional ones may be left out."""
    properties = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", ())
    parts = [literal(f"<function={tool.name}>\n")]
    for key, schema in properties.items():
        begin, end = literal(f"<parameter={key}>\n"), "\n</parameter>\n"
        if is_text(schema) and "enum" not in schema:
            value = rules.add(ANY_TEXT, f"[suffix={literal(end)}]")
        elif is_text(schema):
            value = f"{rules.add(' | '.join(map(literal, schema['enum'])))} {literal(end)}"
        else:
            # targets of its `$ref`s are in the whole schema
            own = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
            value = f"{rules.json({**own, **schema} if isinstance(schema, Mapping) else schema)} {literal(end)}"
        part = rules.add(f"{begin} {value}")
        parts.append(part if key in required else f"{part}?")
    return " ".join([*parts, literal("</function>")])


def is_text(schema: Any) -> bool:
    """Whether a schema allows strings alone."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"
