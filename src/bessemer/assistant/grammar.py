"""Grammars of whole messages, and the tags of thinking in tokens.

A message is thinking, and behind it an answer of a given form, or tool calls. Grammars are in the dialect of Lark's notation
that `llguidance` reads: `<[7]>` is the token 7, `%json {…}` JSON of a schema, and a rule with `[suffix="…"]` any text up to the
first occurrence of that suffix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bessemer.assistant.parser import ThinkingTags
from bessemer.core.errors import RequestError
from bessemer.inference.sampling.grammar import JSON_SPACE
from bessemer.tokenization.tokenizer import Tokenizer

#: A setting of `SamplingParams` that constrains a text, and its value.
Form = tuple[Literal["json_schema", "regex", "choice", "ebnf"], Any]
#: Any text without control tokens, and white space, which ends: a model that has learnt little would write nothing else.
ANY_TEXT, SPACE = "/(?s:.*)/", r"/[ \n]{0,4}/"
_SLASH = re.compile(r"\\.|/", re.DOTALL)
#: The rule `start` of a client's grammar. Possessive, and within a line where it is repeated: linear in any text.
_START = re.compile(r"^([ \t]*+)start\b(?=\s*+(?:\[[^\]\n]*+\]\s*+)?+:)", re.MULTILINE)


class OfferedTool(NamedTuple):
    """A tool that may be called: its name, the JSON schema of its arguments, and whether it is strict about them."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a message must look like.

    thinking: whether the prompt has opened it, it may come, or it may not. tools: those that may be called. must_call: whether
    one has to be. in_parallel: whether several may be. answer: the form of a text that is no call.
    """

    thinking: Literal["open", "may", "never"] = "never"
    tools: Sequence[OfferedTool] = ()
    must_call: bool = False
    in_parallel: bool = True
    answer: Form | None = None

    @property
    def is_free(self) -> bool:
        """Whether any text will do."""
        return self.answer is None and not self.must_call and not any(tool.is_strict for tool in self.tools)


class Rules:
    """The rules of a grammar as they are added. control_id: of a text that is a control token."""

    def __init__(self, control_id: Callable[[str], int | None]) -> None:
        self._control_id = control_id
        self._lines: list[str] = []

    def text(self, start: str) -> str:
        """The grammar as a whole. start: what a message is."""
        return "\n".join([f"start: {start}", *self._lines, ""])

    def add(self, expression: str, attributes: str = "") -> str:
        """A new rule; its name."""
        name = f"part_{len(self._lines)}"
        self._lines.append(f"{name}{attributes}: {expression}")
        return name

    def is_control(self, tag: str) -> bool:
        """Whether a tag is a control token."""
        return self._control_id(tag) is not None

    def tag(self, text: str) -> str:
        """A tag: its token where it is a control token, else its text."""
        id = self._control_id(text)
        return literal(text) if id is None else f"<[{id}]>"

    def json(self, schema: Mapping[str, Any] | bool) -> str:
        """JSON that fits a schema, which is an object or, as parts of one may be, True."""
        schema = schema if isinstance(schema, Mapping) else {}
        return self.add(f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': JSON_SPACE}})}")

    def up_to(self, tag: str) -> str:
        """Any text, and a tag behind it."""
        if self.is_control(tag):
            return f"{ANY_TEXT} {self.tag(tag)}"
        return self.add(ANY_TEXT, f"[suffix={literal(tag)}]")

    def form(self, form: Form) -> str:
        """A text of a form, as a part of a message. Raises RequestError for a JSON schema that is none."""
        name, value = form
        match name:
            case "json_schema":
                return self.json(_as_schema(value))
            case "regex":
                # a slash would end it; what a backslash stands before is as it is
                return self.add("/" + _SLASH.sub(lambda found: found[0] if found[0] != "/" else r"\/", value) + "/")
            case "choice":
                return self.add(" | ".join(map(literal, value)))
            case "ebnf":
                self._lines.append(_START.sub(r"\1whole_answer", value))
                return "whole_answer"


def literal(text: str) -> str:
    """A text in the grammar's quotation marks."""
    return json.dumps(text, ensure_ascii=False)


def _as_schema(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"json_schema does not compile: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("json_schema does not compile: a schema is an object here")
    return value


#: Tokens of a prompt's end in which an opening tag would stand.
_END_OF_PROMPT = 16
#: What may be a control token.
_TAG = re.compile(r"(<[^<>]+>)")


class ThinkingTokens:
    """The tags of thinking as a tokenizer writes them."""

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingTags | None = None) -> None:
        self.tokenizer = tokenizer
        self.tags = tags or ThinkingTags()

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the opening tag, as those of models that always think do."""
        end = self.tokenizer.decode(prompt[-_END_OF_PROMPT:], skip_special=False)
        return end.rstrip().endswith(self.tags.opening)

    @property
    def in_template(self) -> bool:
        """Whether the chat template knows the tags."""
        return self.tags.opening in (self.tokenizer.chat_template or "")

    @property
    def opening(self) -> list[int]:
        """The opening tag, and what stands between it and the thinking."""
        return self._encoded(self.tags.opening + self.tags.inside)

    @property
    def closing(self) -> list[int]:
        """The closing tag and what stands behind it, in the tokens of a text that holds both."""
        return self._encoded(self.tags.closing + self.tags.after)

    @property
    def after(self) -> list[int]:
        """What stands behind a closing tag that the model wrote."""
        return self._encoded(self.tags.after)

    @property
    def answer(self) -> list[int]:
        """What stands before the answer itself, behind thinking or without any."""
        return self._encoded(self.tags.answer)

    @property
    def none(self) -> list[int]:
        """Thinking that holds nothing, as templates write it for an answer without any."""
        return [*self._encoded(self.tags.opening + 2 * self.tags.inside), *self.closing]

    @property
    def closing_token(self) -> int | None:
        """The closing tag, where it is a control token."""
        return self.tokenizer.control_id(self.tags.closing)

    def _encoded(self, text: str) -> list[int]:
        """A text in which control tokens are themselves; the end of a tag that is none may be one token with what follows."""
        ids: list[int] = []
        plain = ""
        for piece in _TAG.split(text):
            control = self.tokenizer.control_id(piece)
            if control is None:
                plain += piece
                continue
            ids += self._plain(plain)
            ids.append(control)
            plain = ""
        return [*ids, *self._plain(plain)]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False) if text else []
