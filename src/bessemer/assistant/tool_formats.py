"""How models write calls of tools: a format is data, and others are added by entry points of `bessemer.tool_formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.assistant.grammar import ANY_TEXT, SPACE, OfferedTool, Rules, Wanted, literal
from bessemer.assistant.json_calls import ParsedCall, Schemas, read_json_calls, read_named_call
from bessemer.assistant.parser import MessageParser, OutputParser, ThinkingTags
from bessemer.assistant.tagged_calls import read_tagged_calls, tagged_arguments
from bessemer.core.registry import Plugin, Registry

#: The grammar of what follows the first opening tag: of these tools, several calls where the flag says so.
CallGrammar = Callable[[Rules, Sequence[OfferedTool], bool], str]


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in a message.

    opening, closing: the tags around a body; without a closing one the body goes on to the message's end. read: the calls of a
    body, at least one, given the schemas of the tools; ValueError says what is wrong with it. calls: their grammar, where
    calls can be held to one. is_bare: whether a message that begins with `{` may be a body as a whole, without tags. is_json:
    whether a closing tag in quotation marks closes nothing. inner: other tags of a body. thinking: the tags around thinking.
    """

    opening: str
    closing: str | None
    read: Callable[[str, Schemas], list[ParsedCall]]
    calls: CallGrammar | None = None
    is_bare: bool = False
    is_json: bool = True
    inner: tuple[str, ...] = ()
    thinking: ThinkingTags = field(default_factory=ThinkingTags)

    def tags(self, *, with_calls: bool) -> frozenset[str]:
        """What the parser must see of control tokens. with_calls: whether tools are offered."""
        calls = (self.opening, self.closing, *self.inner) if with_calls else ()
        return frozenset(filter(None, (*calls, self.thinking.opening, self.thinking.closing)))

    def parser(self, schemas: Schemas | None, *, in_thinking: bool = False) -> MessageParser:
        """A parser of one message. schemas: of the tools that are offered; None: calls are text."""
        return OutputParser(None if schemas is None else self, self.thinking, in_thinking=in_thinking, schemas=schemas)

    def grammar(self, wanted: Wanted, control_id: Callable[[str], int | None]) -> str:
        """The grammar of a message. Raises ValueError where calls of this format cannot be held to one."""
        rules = Rules(control_id)
        begin = ""
        if wanted.thinking in ("open", "may"):
            thought = f"{rules.up_to(self.thinking.closing)} {SPACE}"
            opened = f"{SPACE} {rules.tag(self.thinking.opening)} {thought}"
            begin = thought if wanted.thinking == "open" else f"{rules.add(opened)}?"
        answer = ANY_TEXT if wanted.answer is None else rules.form(wanted.answer)
        if not wanted.tools:
            return rules.text(f"{begin} {answer}")
        if self.calls is None:
            raise ValueError("calls in this format cannot be held to a grammar")
        calls = rules.add(self.calls(rules, wanted.tools, wanted.in_parallel))
        opening = rules.tag(self.opening)
        if wanted.must_call:
            return rules.text(f"{begin} {calls if self.is_bare else f'{opening} {calls}'}")
        if wanted.answer is not None:
            return rules.text(f"{begin} ({answer} | {opening} {calls})")
        return rules.text(f"{begin} ({answer} | {rules.up_to(self.opening)} {calls})")


# -- grammars

_LINE = literal("\n")


def _objects(rules: Rules, tools: Sequence[OfferedTool], arguments: str = "arguments") -> str:
    """A call of one of the tools as an object. arguments: the key of its arguments."""
    calls = []
    for tool in tools:
        beginning = f'{{"name": {literal(tool.name)}, "{arguments}": '
        calls.append(f"{literal(beginning)} {rules.json(tool.parameters)} {literal('}')}")
    return rules.add(" | ".join(calls))


def _repeated(first: str, again: str, in_parallel: bool) -> str:
    return f"{first} ({again})*" if in_parallel else first


def _hermes(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    call = f"{_LINE} {_objects(rules, tools)} {_LINE} {rules.tag('</tool_call>')}"
    return _repeated(call, f"{SPACE} {rules.tag('<tool_call>')} {call}", in_parallel)


def _llama3(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    call = _objects(rules, tools, "parameters")
    return _repeated(call, f"{literal('; ')} {call}", in_parallel)


def _mistral(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    call = _objects(rules, tools)
    calls = _repeated(call, f"{literal(', ')} {call}", in_parallel)
    return f"{literal('[')} {calls} {literal(']')}"


def _mistral_named(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    call = rules.add(" | ".join(f"{literal(tool.name)} {rules.tag('[ARGS]')} {rules.json(tool.parameters)}" for tool in tools))
    return _repeated(call, f"{rules.tag('[TOOL_CALLS]')} {call}", in_parallel)


def _tagged(rules: Rules, tools: Sequence[OfferedTool], in_parallel: bool) -> str:
    call = rules.add(" | ".join(tagged_arguments(rules, tool) for tool in tools))
    call = f"{_LINE} {call} {_LINE} {rules.tag('</tool_call>')}"
    return _repeated(call, f"{SPACE} {rules.tag('<tool_call>')} {call}", in_parallel)


# -- formats


def _read_mistral(body: str, schemas: Mapping[str, Any]) -> list[ParsedCall]:
    """Calls apart by the opening tag, each a name and its arguments behind `[ARGS]`; or a list in JSON."""
    if "[ARGS]" not in body:
        return read_json_calls(body)
    calls = []
    for part in body.split("[TOOL_CALLS]"):
        name, _, arguments = part.partition("[ARGS]")
        calls.append(read_named_call(name.strip(), arguments))
    return calls


_OWN: list[Plugin[ToolFormat]] = [
    Plugin(
        "hermes",
        "`<tool_call>{JSON}</tool_call>`: ours, Hermes, Qwen",
        ToolFormat("<tool_call>", "</tool_call>", read_json_calls, _hermes),
    ),
    Plugin(
        "llama3",
        "`<|python_tag|>{JSON}`, or JSON alone: Llama 3.1 and later",
        ToolFormat("<|python_tag|>", None, read_json_calls, _llama3, is_bare=True),
    ),
    Plugin(
        "mistral",
        "`[TOOL_CALLS][{JSON}, …]`: Mistral until 2025",
        ToolFormat("[TOOL_CALLS]", None, read_json_calls, _mistral),
    ),
    Plugin(
        "mistral_named",
        "`[TOOL_CALLS]name[ARGS]{JSON}`: Mistral since",
        ToolFormat("[TOOL_CALLS]", None, _read_mistral, _mistral_named, inner=("[ARGS]",)),
    ),
    Plugin(
        "qwen3_coder",
        "`<tool_call><function=name><parameter=key>value…`: Qwen3-Coder",
        ToolFormat("<tool_call>", "</tool_call>", read_tagged_calls, _tagged, is_json=False),
    ),
]

#: The format of gpt-oss has messages of its own, and not tags alone.
_OWN.append(
    Plugin(
        "gpt_oss",
        "`<|channel|>commentary to=functions.name<|message|>{JSON}`: gpt-oss",
        "bessemer.assistant.harmony:HARMONY",
    )
)

TOOL_FORMATS: Registry[ToolFormat] = Registry("tool format", "bessemer.tool_formats", _OWN)

#: By what a chat template holds, the first that fits.
_MARKS = {
    "gpt_oss": ("<|channel|>", "<|message|>"),
    "qwen3_coder": ("<tool_call>", "<function="),
    "hermes": ("<tool_call>",),
    "llama3": ("<|python_tag|>",),
    "mistral_named": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral": ("[TOOL_CALLS]",),
}


def format_of_template(chat_template: str | None) -> ToolFormat:
    """The first format of ours whose tags stand in a chat template; else that of Hermes."""
    text = chat_template or ""
    name = next((name for name, marks in _MARKS.items() if all(mark in text for mark in marks)), "hermes")
    return TOOL_FORMATS[name].load()
