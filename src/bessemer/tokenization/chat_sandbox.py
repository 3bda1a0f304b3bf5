"""Jinja for chat templates: what `transformers` offers them, in a sandbox with limits.

A template comes with a tokenizer that somebody made and is run as a program. It reaches nothing but the conversation,
cannot change it, and is stopped after a number of steps and characters. What is not covered: one filter or method that
makes a long text by itself (`center`, `format`), and text doubled by `~` outside any loop.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Rounds of loops and calls of macros in one rendering.
MAX_STEPS = 200_000
#: Characters that a rendering may write, and that `+` or `*` may make of a text, or items of a list.
MAX_LENGTH = 1 << 26
#: Bits of a whole number that `**` or `*` may make.
_MAX_BITS = 4096


@dataclass
class _Rendering:
    """State of a rendering: its remaining steps and characters, and the marks around assistant messages."""

    marks: tuple[str, str]
    steps_left: int = MAX_STEPS


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
    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
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
        rendering.steps_left -= 1
        if rendering.steps_left < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")
        return ""


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
            tree = environment.parse(text)
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
