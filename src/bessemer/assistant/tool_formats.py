"""How models write tool calls: a format is data, and others are added by entry points of `bessemer.tool_formats`.

Most formats hold JSON between tags. Qwen3-Coder writes each argument in tags of its own:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    value
    </parameter>
    </function>
    </tool_call>

Values have no quotation marks there: the schema says whether `3` is a number or a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.assistant.call_grammars import (
    deepseek_calls,
    deepseek_v31_calls,
    glm_calls,
    hermes_calls,
    is_text,
    llama3_calls,
    mistral_calls,
    mistral_named_calls,
    tagged_calls,
)
from bessemer.assistant.grammar import ANY_TEXT, SPACE, MessageForm, OfferedTool, Rules
from bessemer.assistant.parser import (
    MessageParser,
    OutputParser,
    ParsedCall,
    Schemas,
    ThinkingTags,
    checked_call,
    read_json_calls,
    read_named_call,
    read_value,
)
from bessemer.assistant.written import (
    DEEPSEEK,
    CallWriter,
    Piece,
    glm_body,
    in_tags,
    json_body,
    parameters_body,
    write_deepseek,
    write_llama3,
    write_mistral,
    write_mistral_named,
)
from bessemer.core.registry import Plugin, Registry
from bessemer.tokenization.tokenizer import Tokenizer

_FUNCTION = re.compile(r"\s*<function=([^>]*)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>\n?(.*?)(?:\n?</parameter>|\Z)", re.DOTALL)
_TEXT = {"type": "string"}
#: Python's words that models write instead of JSON's.
_PYTHON = {"True": True, "False": False, "None": None}
#: Limits of the nesting and the number of subschemas that are checked for a value: a schema may refer to itself.
_DEEPEST, _MOST = 16, 1000


def read_tagged_calls(body: str, schemas: Schemas) -> list[ParsedCall]:
    """The call in tags. Raises ValueError."""
    match = _FUNCTION.fullmatch(body)
    if match is None:
        raise ValueError("must be <function=NAME> with its parameters")
    name, inner = match[1].strip(), match[2]
    if not name:
        raise ValueError("has no name")
    return [checked_call(name, _tagged_arguments(inner, _PARAMETER, "parameter", schemas.get(name, {}), _TEXT))]


def _tagged_arguments(
    text: str, pattern: re.Pattern[str], what: str, whole: Mapping[str, Any], unknown: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that stand one behind the other in tags, each a match of name and value. whole: the tool's schema; unknown:
    that of an argument which the tool does not have. Raises ValueError."""
    properties = whole.get("properties", {})
    arguments: dict[str, Any] = {}
    place = 0
    while text[place:].strip():
        match = pattern.match(text, place)
        if match is None:
            raise ValueError(f"what follows is no {what}: {text[place:].strip()[:60]!r}")
        key = match[1].strip()
        arguments[key] = _value(match[2], properties.get(key, unknown) if isinstance(properties, Mapping) else unknown, whole)
        place = match.end()
    return arguments


def _value(text: str, schema: Any, whole: Mapping[str, Any]) -> Any:
    """A value as its schema demands: the text where it must be a string, else the first reading that fits, else the first
    reading. whole: the schema that `$ref`s point into."""
    if is_text(schema):
        return text
    readings = list(_readings(text))
    return next((value for value in readings if _Fit(whole).allows(value, schema)), readings[0])


def _readings(text: str) -> Iterator[Any]:
    """Possible values of a text: as JSON, as a word of Python, as a string."""
    try:
        yield read_value(text.strip())
    except ValueError:
        pass
    if text.strip() in _PYTHON:
        yield _PYTHON[text.strip()]
    yield text


class _Fit:
    """Checks a value against a schema's types, `enum`, `const`, unions and references.

    Patterns and the contents of lists and objects are left to the tool, which has a time limit.
    """

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._looks = 0

    def allows(self, value: Any, schema: Any, depth: int = 0) -> bool:
        """Whether a schema allows the value, within the limits."""
        self._looks += 1
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping) or depth > _DEEPEST or self._looks > _MOST:
            return True
        kinds = schema.get("type", ())
        kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
        if kinds and not any(_is_of(value, kind) for kind in kinds):
            return False
        if "enum" in schema and not any(_is_same(value, allowed) for allowed in schema["enum"]):
            return False
        if "const" in schema and not _is_same(value, schema["const"]):
            return False
        all_of = [*schema.get("allOf", ())]
        if "$ref" in schema:
            all_of.append(_referred(schema["$ref"], self._whole))
        return all(self.allows(value, part, depth + 1) for part in all_of) and all(
            any(self.allows(value, part, depth + 1) for part in schema[key]) for key in ("anyOf", "oneOf") if key in schema
        )


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a JSON schema's type; an unknown type allows all."""
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
    """Whether JSON values are equal; True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _referred(reference: Any, whole: Mapping[str, Any]) -> Any:
    """The target of a `$ref` within the schema; True, which allows all, for any other."""
    target: Any = whole
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, Mapping) or step not in target:
            return True
        target = target[step]
    return target


#: The grammar after the first opening tag, from the tools and whether several calls are allowed.
CallGrammar = Callable[[Rules, Sequence[OfferedTool], bool], str]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    opening, closing: the tags around a body; without a closing tag, the body ends with the message. read: the calls of a body,
    given the tools' schemas; raises ValueError. calls: their grammar, where there is one. is_bare: whether a message that
    begins with `{` may be a body without tags. may_lack_tags: whether a message that is nothing but calls of offered tools
    without their tags, in a block of code or not, is these calls: small models forget the tags. is_json: whether closing tags
    inside JSON strings are ignored. inner: other tags of a body. thinking: the tags around thinking. write: its calls as a
    model writes them; None: they are trained on only as the chat template writes them. one_call: whether a turn has one call
    at most.
    """

    opening: str
    closing: str | None
    read: Callable[[str, Schemas], list[ParsedCall]]
    calls: CallGrammar | None = None
    is_bare: bool = False
    may_lack_tags: bool = False
    is_json: bool = True
    inner: tuple[str, ...] = ()
    thinking: ThinkingTags = field(default_factory=ThinkingTags)
    write: CallWriter | None = None
    one_call: bool = False

    @property
    def inner_tags(self) -> frozenset[str]:
        """Tags that end no turn, though they may be control tokens."""
        return self.tags(with_calls=True)

    def written(self, thinking: str, text: str, calls: Sequence[ParsedCall], *, is_open: bool) -> list[Piece]:
        """A message as a model writes it, without its end token. is_open: whether the prompt has opened the thinking.

        Raises ValueError where calls in this format cannot be written.
        """
        if calls and self.write is None:
            raise ValueError("calls in this format cannot be written")
        body = [Piece(text), *(self.write(calls, bool(text)) if calls and self.write is not None else [])]
        return [*self.written_thinking(thinking, is_open=is_open), *body]

    def written_thinking(self, thinking: str, *, is_open: bool) -> list[Piece]:
        """The thinking of a message with its tags; nothing where there is none and the prompt has opened none."""
        tags = self.thinking
        closed = [Piece(tags.closing, True), Piece(tags.after)]
        if not thinking:
            return closed if is_open else []
        opening = [] if is_open else [Piece(tags.opening, True), Piece(tags.inside)]
        return [*opening, Piece(thinking + tags.inside), *closed]

    def tags(self, *, with_calls: bool) -> frozenset[str]:
        """Control tokens that the parser needs. with_calls: whether tools are offered."""
        calls = (self.opening, self.closing, *self.inner) if with_calls else ()
        return frozenset(filter(None, (*calls, self.thinking.opening, self.thinking.closing)))

    def parser(self, schemas: Schemas | None, *, in_thinking: bool = False, is_tagged: bool = False) -> MessageParser:
        """A parser of one message. schemas: of the offered tools; None: calls are text. is_tagged: whether calls
        without their tags are text too."""
        offered = None if schemas is None else self
        return OutputParser(offered, self.thinking, in_thinking=in_thinking, schemas=schemas, is_tagged=is_tagged)

    def grammar(self, wanted: MessageForm, control_id: Callable[[str], int | None]) -> str:
        """The grammar of a message. Raises ValueError where this format has no grammar of calls."""
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


# -- formats

_KEYED = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A\s*(\S+)\s*```(?:json)?\s*(.*?)\s*(?:```)?\s*\Z", re.DOTALL)


def read_keyed_calls(body: str, schemas: Schemas) -> list[ParsedCall]:
    """GLM's call: a name, then names and values of arguments in tags. Raises ValueError."""
    name, tag, rest = body.partition("<arg_key>")
    name, rest = name.strip(), tag + rest
    if not name:
        raise ValueError("has no name")
    return [checked_call(name, _tagged_arguments(rest, _KEYED, "argument", schemas.get(name, {}), {}))]


def read_deepseek_calls(body: str, schemas: Schemas) -> list[ParsedCall]:
    """DeepSeek's calls: a name and JSON behind a separator, or a kind, and then a name with JSON within ```. Raises
    ValueError."""
    _, _, begin, separator, end = DEEPSEEK
    calls = []
    for part in body.split(begin)[1:]:
        before, found, after = part.partition(end)[0].partition(separator)
        if not found:
            raise ValueError(f"has no {separator}")
        fenced = _FENCE.match(after) if "```" in after and not after.lstrip().startswith("{") else None
        name, arguments = (fenced[1], fenced[2]) if fenced else (before.strip(), after)
        calls.append(read_named_call(name, arguments))
    if not calls:
        raise ValueError("empty")
    return calls


def _read_mistral(body: str, schemas: Mapping[str, Any]) -> list[ParsedCall]:
    """Calls separated by the opening tag, each a name and its arguments after `[ARGS]`; or a list in JSON."""
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
        ToolFormat(
            "<tool_call>",
            "</tool_call>",
            read_json_calls,
            hermes_calls,
            may_lack_tags=True,
            write=in_tags("<tool_call>", "</tool_call>", json_body),
        ),
    ),
    Plugin(
        "llama3",
        "`<|python_tag|>{JSON}`, or JSON alone: Llama 3.1 and later",
        ToolFormat("<|python_tag|>", None, read_json_calls, llama3_calls, is_bare=True, write=write_llama3, one_call=True),
    ),
    Plugin(
        "mistral",
        "`[TOOL_CALLS][{JSON}, …]`: Mistral until 2025",
        ToolFormat("[TOOL_CALLS]", None, read_json_calls, mistral_calls, write=write_mistral),
    ),
    Plugin(
        "mistral_named",
        "`[TOOL_CALLS]name[ARGS]{JSON}`: Mistral since",
        ToolFormat("[TOOL_CALLS]", None, _read_mistral, mistral_named_calls, inner=("[ARGS]",), write=write_mistral_named),
    ),
    Plugin(
        "qwen3_coder",
        "`<tool_call><function=name><parameter=key>value…`: Qwen3-Coder",
        ToolFormat(
            "<tool_call>",
            "</tool_call>",
            read_tagged_calls,
            tagged_calls,
            is_json=False,
            write=in_tags("<tool_call>", "</tool_call>", parameters_body),
        ),
    ),
    Plugin(
        "glm",
        "`<tool_call>name<arg_key>key</arg_key><arg_value>value…`: GLM-4.5 and later",
        ToolFormat(
            "<tool_call>",
            "</tool_call>",
            read_keyed_calls,
            glm_calls,
            is_json=False,
            inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
            thinking=ThinkingTags(after="\n", inside=""),
            write=in_tags("<tool_call>", "</tool_call>", glm_body),
        ),
    ),
    Plugin(
        "deepseek",
        "`<｜tool▁calls▁begin｜>…function<｜tool▁sep｜>name` and JSON within ```: DeepSeek-V3, R1",
        ToolFormat(
            DEEPSEEK[0], DEEPSEEK[1], read_deepseek_calls, deepseek_calls, inner=DEEPSEEK[2:], write=write_deepseek(fenced=True)
        ),
    ),
    Plugin(
        "deepseek_v31",
        "`<｜tool▁calls▁begin｜>…name<｜tool▁sep｜>{JSON}`: DeepSeek-V3.1",
        ToolFormat(
            DEEPSEEK[0],
            DEEPSEEK[1],
            read_deepseek_calls,
            deepseek_v31_calls,
            inner=DEEPSEEK[2:],
            write=write_deepseek(fenced=False),
        ),
    ),
]

#: Loaded late: `harmony` imports this module.
_OWN.append(
    Plugin(
        "gpt_oss",
        "`<|channel|>commentary to=functions.name<|message|>{JSON}`: gpt-oss",
        "bessemer.assistant.harmony:HARMONY",
    )
)

TOOL_FORMATS: Registry[ToolFormat] = Registry("tool format", "bessemer.tool_formats", _OWN)

#: Name → tags in a chat template; the first match counts.
_MARKS = {
    "gpt_oss": ("<|channel|>", "<|message|>"),
    "glm": ("<tool_call>", "<arg_key>"),
    "qwen3_coder": ("<tool_call>", "<function="),
    "hermes": ("<tool_call>",),
    "llama3": ("<|python_tag|>",),
    "mistral_named": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral": ("[TOOL_CALLS]",),
    "deepseek": (DEEPSEEK[0], "```json"),
    "deepseek_v31": (DEEPSEEK[0],),
}


def format_name(chat_template: str | None) -> str:
    """The name of the first built-in format whose tags are in a chat template; else Hermes."""
    text = chat_template or ""
    return next((name for name, marks in _MARKS.items() if all(mark in text for mark in marks)), "hermes")


def format_of_template(chat_template: str | None) -> ToolFormat:
    """The format of `format_name`."""
    return TOOL_FORMATS[format_name(chat_template)].load()


def format_name_of(tokenizer: Tokenizer) -> str:
    """The name of the format that a model was trained on, as its tokenizer's folder says; else that of its chat template."""
    name = tokenizer.tool_format
    return name if name and name in TOOL_FORMATS else format_name(tokenizer.chat_template)


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """The format of `format_name_of`."""
    return TOOL_FORMATS[format_name_of(tokenizer)].load()
