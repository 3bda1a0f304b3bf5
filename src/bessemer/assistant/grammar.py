"""Grammars of whole messages, and the tags of thinking in tokens.

A message is thinking, and then an answer of a given form, or tool calls. Grammars are in the dialect of Lark's notation
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
#: Any text without control tokens; and white space, limited because a weak model would write nothing else.
ANY_TEXT, SPACE = "/(?s:.*)/", r"/[ \n]{0,4}/"
_SLASH = re.compile(r"\\.|/", re.DOTALL)
#: The rule `start` of a client's grammar. Possessive quantifiers keep the match linear in any text.
_START = re.compile(r"^([ \t]*+)start\b(?=\s*+(?:\[[^\]\n]*+\]\s*+)?+:)", re.MULTILINE)


class OfferedTool(NamedTuple):
    """A tool for the grammar. parameters: JSON schema; is_strict: whether calls must follow it."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


@dataclass(frozen=True)
class MessageForm:
    """What a message must look like.

    thinking: opened by the prompt, allowed, or not. tools: may be called; must_call: one has to be; in_parallel: several may
    be. answer: the form of a text that is no call.
    """

    thinking: Literal["open", "may", "never"] = "never"
    tools: Sequence[OfferedTool] = ()
    must_call: bool = False
    in_parallel: bool = True
    answer: Form | None = None

    @property
    def is_free(self) -> bool:
        """Whether any text is allowed."""
        return self.answer is None and not self.must_call and not any(tool.is_strict for tool in self.tools)


class Rules:
    """Rules of a grammar, added one by one. control_id: the token id of a control token's text."""

    def __init__(self, control_id: Callable[[str], int | None]) -> None:
        self._control_id = control_id
        self._lines: list[str] = []

    def text(self, start: str) -> str:
        """The whole grammar. start: the expression of a message."""
        return "\n".join([f"start: {start}", *self._lines, ""])

    def add(self, expression: str, attributes: str = "") -> str:
        """Add a rule. Returns its name."""
        name = f"part_{len(self._lines)}"
        self._lines.append(f"{name}{attributes}: {expression}")
        return name

    def is_control(self, tag: str) -> bool:
        return self._control_id(tag) is not None

    def tag(self, text: str) -> str:
        """An expression for a tag: its token where it is a control token, else its text."""
        id = self._control_id(text)
        return literal(text) if id is None else f"<[{id}]>"

    def json(self, schema: Mapping[str, Any] | bool) -> str:
        """JSON that fits a schema; subschemas may be True."""
        schema = schema if isinstance(schema, Mapping) else {}
        return self.add(f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': JSON_SPACE}})}")

    def up_to(self, tag: str) -> str:
        """Any text up to and with a tag."""
        if self.is_control(tag):
            return f"{ANY_TEXT} {self.tag(tag)}"
        return self.add(ANY_TEXT, f"[suffix={literal(tag)}]")

    def form(self, form: Form) -> str:
        """A text of a form. Raises RequestError for an invalid JSON schema."""
        name, value = form
        match name:
            case "json_schema":
                return self.json(_as_schema(value))
            case "regex":
                # an unescaped slash would end the expression
                return self.add("/" + _SLASH.sub(lambda match: match[0] if match[0] != "/" else r"\/", value) + "/")
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


#: Last tokens of a prompt that may hold an opening tag.
_END_OF_PROMPT = 16
#: A possible control token.
_TAG = re.compile(r"(<[^<>]+>)")


class ThinkingTokens:
    """The tags of thinking as token ids."""

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingTags | None = None) -> None:
        self.tokenizer = tokenizer
        self.tags = tags or ThinkingTags()

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the opening tag, as for models that always think."""
        end = self.tokenizer.decode(prompt[-_END_OF_PROMPT:], skip_special=False)
        return end.rstrip().endswith(self.tags.opening)

    @property
    def in_template(self) -> bool:
        """Whether the chat template knows the tags."""
        return self.tags.opening in (self.tokenizer.chat_template or "")

    @property
    def opening(self) -> list[int]:
        """The opening tag and the white space after it."""
        return self._encoded(self.tags.opening + self.tags.inside)

    @property
    def closing(self) -> list[int]:
        """The closing tag and the white space after it, encoded together."""
        return self._encoded(self.tags.closing + self.tags.after)

    @property
    def after(self) -> list[int]:
        """The white space after a closing tag that the model wrote."""
        return self._encoded(self.tags.after)

    @property
    def answer(self) -> list[int]:
        """The tag that opens the answer, where the format has one."""
        return self._encoded(self.tags.answer)

    @property
    def none(self) -> list[int]:
        """Empty thinking, as templates write it for an answer without thinking."""
        return [*self._encoded(self.tags.opening + 2 * self.tags.inside), *self.closing]

    @property
    def closing_token(self) -> int | None:
        """The closing tag's id, where it is a control token."""
        return self.tokenizer.control_id(self.tags.closing)

    def _encoded(self, text: str) -> list[int]:
        """Encode a text with its control tokens. Other text is encoded in one piece, since a token may span a tag's end."""
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
