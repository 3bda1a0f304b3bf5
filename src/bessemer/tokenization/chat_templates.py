"""Chat templates: those that a recipe can choose, and the sandbox of Jinja that renders any.

Each of ours is written once, with `{% generation %}` around the assistant's text. A tokenizer's folder stores it without these
tags, which llama.cpp does not know; both render the same.

A template is a program that comes with a tokenizer, from any author. It has the functions that `transformers` offers, sees
nothing but the conversation and cannot change it. It is stopped after `MAX_STEPS` steps, `MAX_LENGTH` characters, or
`MAX_SECONDS` of processor time on the rendering thread. The time is checked before every step, call, filter, sum and
concatenation, so one Python operation on values within the limits runs between two checks. Not covered: `format` with a text
that repeats a long argument.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bessemer.tokenization.control_tokens import END_HEADER, END_OF_TURN, IM_END, IM_START, START_HEADER

#: Turns between control tokens. OPEN and NAMED stand for the text around a role, CLOSE and AFTER for that after a content.
#: Tools are described in the system turn, called by the assistant in <tool_call> and answered in <tool_response>, the
#: form of the Hermes models, which llama.cpp and vLLM read; results that follow each other share one turn.
_TURNS = r"""{{- bos_token -}}
{%- if tools -%}
    {{- 'OPENsystemNAMED' -}}
    {%- if messages[0].role == 'system' -%}
        {{- messages[0].content + '\n\n' -}}
    {%- endif -%}
    {{- '# Tools\n\nYou can call these functions, each described in JSON:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nTo call one, write its name and its arguments in JSON, every call between tags of its own:\n' -}}
    {{- '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>CLOSEAFTER' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- 'OPENuserNAMED' -}}
        {%- else -%}
            {{- '\n' -}}
        {%- endif -%}
        {{- '<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- 'CLOSEAFTER' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- 'OPENassistantNAMED' -}}
        {%- generation -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- if message.content or not loop.first -%}
                {{- '\n' -}}
            {%- endif -%}
            {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {%- if function.arguments is string -%}
                {{- function.arguments -}}
            {%- else -%}
                {{- function.arguments | tojson -}}
            {%- endif -%}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- 'CLOSE' -}}
        {%- endgeneration -%}
        {{- 'AFTER' -}}
    {%- elif not (tools and loop.first and message.role == 'system') -%}
        {{- 'OPEN' + message.role + 'NAMED' + message.content + 'CLOSEAFTER' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'OPENassistantNAMED' -}}
{%- endif -%}
"""

#: Text with speakers' names. The space after `Assistant:` belongs to the assistant, because a word and the space before it are
#: one token: after a prompt that ends in a space the model would have to begin with a word in a form it has not seen there.
_PLAIN = r"""{%- if tools -%}
    {{- raise_exception('the plain chat template has no place for tools; chatml and llama3 have') -}}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' or message.tool_calls -%}
        {{- raise_exception('the plain chat template has no place for tools; chatml and llama3 have') -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant:' -}}
        {%- generation -%}
        {{- ' ' + (message.content | trim) + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- (message.role | capitalize) + ': ' + message.content + '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""


def _turns(opening: str, named: str, closing: str, after: str) -> str:
    """A template of turns. With an empty `after`, the line that would write it is left out."""
    text = _TURNS if after else _TURNS.replace("        {{- 'AFTER' -}}\n", "")
    for place, words in {"OPEN": opening, "NAMED": named, "CLOSE": closing, "AFTER": after}.items():
        text = text.replace(place, words)
    return text


#: The templates with the assistant's text in `{% generation %}`, from which training takes its mask.
MARKED_TEMPLATES = {
    "chatml": _turns(IM_START, r"\n", IM_END, r"\n"),
    "llama3": _turns(START_HEADER, END_HEADER + r"\n\n", END_OF_TURN, ""),
    "plain": _PLAIN,
}

#: The template of each name, as it is stored in the tokenizer's folder.
CHAT_TEMPLATES = {
    name: re.sub(r"^ *\{%- (?:end)?generation -%\}\n", "", text, flags=re.MULTILINE) for name, text in MARKED_TEMPLATES.items()
}


def template_name(text: str) -> str | None:
    """The name of one of our templates; None for another one."""
    return next((name for name, known in CHAT_TEMPLATES.items() if known == text), None)


def with_place_for_pictures(text: str, image: str) -> str:
    """One of our templates, of `CHAT_TEMPLATES`, that also writes contents of parts, with the token `image` for a picture."""
    line = next(line for line in text.splitlines() if "message.role" in line and "+ message.content +" in line)
    before, _, after = line.partition(" + message.content + ")
    parts = (
        f"{before} -}}}}",
        "        {%- if message.content is string -%}",
        "            {{- message.content -}}",
        "        {%- else -%}",
        "            {%- for part in message.content -%}",
        "                {%- if part.type == 'image' -%}",
        f"                    {{{{- '{image}' -}}}}",
        "                {%- else -%}",
        "                    {{- part.text -}}",
        "                {%- endif -%}",
        "            {%- endfor -%}",
        "        {%- endif -%}",
        f"        {{{{- {after}",
    )
    return text.replace(line, "\n".join(parts))


#: Rounds of loops and calls of macros in one rendering.
MAX_STEPS = 200_000
#: Largest length of a rendering in characters, and of a text or list that `+` or `*` makes.
MAX_LENGTH = 1 << 26
#: Processor time of a rendering, in seconds.
MAX_SECONDS = 10.0
#: Largest number as an argument of a method or filter: a width, an indentation, a count.
_LARGEST_ARGUMENT = 100_000
#: A format field with a larger width than that: six digits or more.
_WIDE_FIELD = re.compile(r"[{%][^{}%]{0,40}\d{6}")
#: Jinja filters whose time grows with the square of the text; chat templates have no use for them.
_SLOW_FILTERS = ("urlize", "striptags", "wordwrap")
#: Largest size of an integer that `**` or `*` makes, in bits.
_MAX_BITS = 4096


@dataclass
class _Rendering:
    """State of a rendering: its remaining steps and characters, and the marks around assistant messages."""

    marks: tuple[str, str]
    steps_left: int = MAX_STEPS
    ends_at: float = field(default_factory=lambda: time.thread_time() + MAX_SECONDS)


_rendering: ContextVar[_Rendering] = ContextVar("chat template rendering")


class _Generation(Extension):
    """The tag `{% generation %}…{% endgeneration %}`, which puts marks around an assistant message."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """The body between the marks of this rendering."""
        begin, end = _rendering.get().marks
        return f"{begin}{caller()}{end}"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template, within the limits."""
        check_time()
        # the sandbox wraps `str.format`
        bound = getattr(obj, "__wrapped__", obj)
        owner, method = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
        if isinstance(owner, str):
            if method == "join" and len(args) == 1 and isinstance(args[0], Iterator):
                # what is measured must still be there for the call
                args = (list(args[0]),)
            _check_arguments(args, kwargs)
            _check_method(owner, method, args)
        return super().call(context, obj, *args, **kwargs)

    def concatenate(self, *parts: Any) -> str:
        """The operator `~`, within the limits."""
        texts = [str(part) for part in parts]
        _limit(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_time()
        if operator == "%":
            if isinstance(left, str):
                _check_format(left)
        elif operator == "+":
            if isinstance(left, str | list) and isinstance(right, str | list):
                _limit(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError("the template makes too large a number")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _limit(len(sequence) * times)
        return super().call_binop(context, operator, left, right)

    def count_step(self) -> str:
        """Called in every iteration of a loop and by every macro."""
        rendering = _rendering.get()
        check_time()
        rendering.steps_left -= 1
        if rendering.steps_left < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")
        return ""


def check_time() -> None:
    """Raises SecurityError when the rendering on this thread has used up its time."""
    if time.thread_time() > _rendering.get().ends_at:
        raise SecurityError(f"the template takes more than {MAX_SECONDS:g} s")


def _check_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(each, int) and abs(each) > _LARGEST_ARGUMENT for each in (*args, *kwargs.values())):
        raise SecurityError(f"the template calls a function with a number above {_LARGEST_ARGUMENT:,}")


def _check_format(text: str) -> None:
    if _WIDE_FIELD.search(text):
        raise SecurityError("the template formats a number or a text in too wide a field")


def _check_method(text: str, method: str, args: Sequence[Any]) -> None:
    """Raise SecurityError before a text's method makes a result above the limits."""
    match method, args:
        case (("format" | "format_map"), _):
            _check_format(text)
        case "join", [items]:
            if isinstance(items, Collection):
                _limit(sum(len(item) for item in items if isinstance(item, str)) + len(text) * len(items))
        case "replace", [str() as old, str() as new, *_]:
            _limit(len(text) + text.count(old) * len(new))
        case "expandtabs", _:
            size = args[0] if args and isinstance(args[0], int) else 8
            _limit(len(text) + text.count("\t") * abs(size))
        case "translate", _:
            raise SecurityError("the template translates characters")


def _within_limits(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A Jinja filter that checks the time and its arguments first."""

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        check_time()
        # Jinja's own argument, the context or the environment, comes first
        own = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_arguments(own[1:], kwargs)
        if name == "replace":
            _check_method(str(own[0]), name, [str(each) for each in own[1:3]])
        elif name == "join":
            items = list(own[0])
            _check_method(str(own[1] if len(own) > 1 else kwargs.get("d", "")), name, [items])
            args = (*args[: len(args) - len(own)], items, *own[1:])
        elif name == "format":
            _check_format(str(own[0]))
        return function(*args, **kwargs)

    return limited


class _Concatenations(NodeTransformer):
    """Turns `a ~ b` into a call of `_Environment.concatenate`, which limits it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno, override=True).set_environment(_environment())


def _limit(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(f"the template makes more than {MAX_LENGTH:,} characters")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as `transformers` writes it for templates: characters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _within_limits(name, function) for name, function in environment.filters.items() if name not in _SLOW_FILTERS
    }
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]
    return environment


class TemplateError(Exception):
    """An error of a template or its input: one line, with the template's line number where it is known."""

    def __init__(self, error: BaseException) -> None:
        line = getattr(error, "lineno", None) or _line_of(error)
        words = " ".join(str(error).split())[:500] or type(error).__name__
        super().__init__(words)
        self.line: int | None = line


def _line_of(error: BaseException) -> int | None:
    """The template's line that raised an error; jinja names its frames `<template>` or `<unknown>`."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename in ("<template>", "<unknown>")), None)


class CompiledTemplate:
    """A template ready to render. Raises TemplateError when it is not jinja."""

    def __init__(self, text: str) -> None:
        environment = _environment()
        try:
            tree = _Concatenations().visit(environment.parse(text))
            self.marks_generation = any(
                isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock)
            )
            for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
                assert isinstance(loop, nodes.For | nodes.Macro | nodes.CallBlock)
                step = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None))
                loop.body.insert(0, step.set_lineno(loop.lineno, override=True).set_environment(environment))
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, TypeError, ArithmeticError) as error:
            raise TemplateError(error) from None
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], marks: tuple[str, str]) -> str:
        """The text for these variables, with marks around each `{% generation %}` block. Raises TemplateError."""
        with _limits(marks):
            written, length = [], 0
            try:
                for piece in self._template.generate(**variables):
                    length += len(piece)
                    _limit(length)
                    written.append(piece)
            except Exception as error:
                # whatever the template's own code raises
                raise TemplateError(error) from None
        return "".join(written)


@contextmanager
def _limits(marks: tuple[str, str]) -> Iterator[None]:
    token = _rendering.set(_Rendering(marks))
    try:
        yield
    finally:
        _rendering.reset(token)
