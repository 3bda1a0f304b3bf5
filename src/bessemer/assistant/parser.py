"""Parser of a model's output: deltas of text in, thinking, text and tool calls out, never half a tag.

Tool calls in JSON are read here; other notations in `tool_formats`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

from bessemer.assistant.messages import BadCall, TextDelta, ThinkingDelta
from bessemer.inference.sampling.params import overlap

#: JSON schema of each tool's arguments, by the tool's name.
Schemas = Mapping[str, Mapping[str, Any]]


class ParsedCall(NamedTuple):
    """A call as the model wrote it."""

    name: str
    arguments: dict[str, Any]


def checked_call(name: str, arguments: dict[str, Any]) -> ParsedCall:
    """A call. Raises ValueError for text without UTF-8, which no template can write."""
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is no character") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    return ParsedCall(name, arguments)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def read_value(text: str) -> Any:
    """A value in JSON. Raises ValueError, also for NaN, infinities and deep nesting."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_calls(body: str, schemas: Schemas | None = None) -> list[ParsedCall]:
    """Calls in JSON: objects with `name` and `arguments` or `parameters`, alone, in a list, or separated by `;`.

    Arguments may be a string of JSON, as in chat completions. Raises ValueError.
    """
    calls: list[ParsedCall] = []
    place = 0
    try:
        while place < len(body):
            if body[place].isspace() or body[place] == ";":
                place += 1
                continue
            value, place = _DECODER.raw_decode(body, place)
            calls += [_as_call(one) for one in (value if isinstance(value, list) else [value])]
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not calls:
        raise ValueError("empty")
    return calls


def read_named_call(name: str, arguments: str) -> ParsedCall:
    """A call from its name and its arguments in JSON. Raises ValueError."""
    if not name:
        raise ValueError("has no name")
    value = read_value(arguments) if arguments.strip() else {}
    if not isinstance(value, dict):
        raise ValueError(f"the arguments must be an object, got {json.dumps(value)[:60]}")
    return checked_call(name, value)


def _as_call(value: Any) -> ParsedCall:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with name and arguments, got {json.dumps(value)[:60]}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("has no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_value(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments must be an object, got {json.dumps(arguments)[:60]}")
    return checked_call(name, arguments)


ParsedEvent = ThinkingDelta | TextDelta | ParsedCall | BadCall

#: A line that opens or closes a block of code, and what an opening one is.
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)
_FIRST_FENCE = re.compile(r"```\w{0,16}[ \t]*")
#: Characters within which it is decided whether a text begins as a call.
_HEAD = 1000
#: A quotation mark of JSON that no backslash escapes.
_QUOTE = re.compile(r'\\.|(")', re.DOTALL)


def begins_as_call(text: str, schemas: Schemas) -> bool | None:
    """Whether a text begins as a call in JSON of one of the tools, or as a list of calls, in a block of code or not. None: it
    may, and what comes next decides."""
    if text.startswith("`"):
        first, newline, text = text.partition("\n")
        if not newline:
            return None if "```".startswith(first) or _FIRST_FENCE.fullmatch(first) else False
        if not _FIRST_FENCE.fullmatch(first):
            return False
    if len(text) > _HEAD:
        return False
    begun = "".join(text.split()).removeprefix("[")
    heads = [f'{{"name":{json.dumps(name, ensure_ascii=False)}' for name in schemas]
    if any(begun.startswith(head) for head in heads):
        return True
    return None if any(head.startswith(begun) for head in heads) else False


class ThinkingTags(NamedTuple):
    """The texts around a message's thinking.

    after: a template's white space after the closing tag. inside: the same between a tag and the thinking. answer: opens the
    answer itself; no call can come after it.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    after: str = "\n\n"
    inside: str = "\n"
    answer: str = ""


class MessageParser(ABC):
    """Deltas of one message's text in, thinking, text and calls out.

    However the text is cut into deltas, the joined events are the same.
    """

    def __init__(self) -> None:
        self._buffer = ""

    @property
    @abstractmethod
    def in_thinking(self) -> bool:
        """Whether thinking is open."""

    @property
    @abstractmethod
    def is_undecided(self) -> bool:
        """Whether thinking may still open."""

    @property
    def may_think_again(self) -> bool:
        """Whether thinking may open again, later in the message."""
        return False

    def feed(self, text: str) -> list[ParsedEvent]:
        """Events that are certain after this text."""
        self._buffer += text
        return self._events(final=False)

    def finish(self) -> list[ParsedEvent]:
        """The remaining events, when no more text comes. A call without its closing tag counts where it can be read."""
        events = self._events(final=True)
        self._buffer = ""
        return events

    @abstractmethod
    def close_thinking(self) -> list[ParsedEvent]:
        """End the thinking as if its closing tag had come; half of a tag is dropped."""

    def _events(self, final: bool) -> list[ParsedEvent]:
        events: list[ParsedEvent] = []
        while self._step(events, final):
            pass
        return events

    @abstractmethod
    def _step(self, events: list[ParsedEvent], final: bool) -> bool:
        """Go from one state to the next. False where more text is needed, or none is left."""


class _State(Enum):
    BEGINNING = auto()  # thinking may open
    ANSWER = auto()  # a call without tags may stand here
    THINKING = auto()
    TEXT = auto()
    CALL = auto()
    BARE_CALL = auto()


class CallTags(Protocol):
    """What the parser reads of a `ToolFormat`, where its fields are described."""

    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str | None: ...
    @property
    def is_bare(self) -> bool: ...
    @property
    def may_lack_tags(self) -> bool: ...
    @property
    def is_json(self) -> bool: ...
    @property
    def read(self) -> Callable[[str, Schemas], list[ParsedCall]]: ...


class OutputParser(MessageParser):
    """Parses a message with thinking at its beginning, text, and calls in tags.

    White space around thinking and calls is left out; that of a plain text is kept.
    """

    def __init__(
        self,
        tool_format: CallTags | None,
        thinking: ThinkingTags | None = None,
        *,
        in_thinking: bool = False,
        schemas: Schemas | None = None,
        is_tagged: bool = False,
    ) -> None:
        """tool_format: None where no tools are offered: calls are text then. in_thinking: whether the prompt has opened the
        thinking. is_tagged: whether a call that lacks its tags is text, since a grammar holds what stands in tags."""
        super().__init__()
        self._format = tool_format
        self._schemas = schemas or {}
        self._is_tagged = is_tagged
        self._tags = thinking or ThinkingTags()
        self._state = _State.THINKING if in_thinking else _State.BEGINNING
        #: Whether the next white space is left out.
        self._skips_space = in_thinking
        #: In a call: where the search for its closing tag goes on, and the quotation marks counted up to a position.
        self._searched = self._counted = self._quotes = 0

    @property
    def in_thinking(self) -> bool:
        return self._state is _State.THINKING

    @property
    def is_undecided(self) -> bool:
        return self._state is _State.BEGINNING

    def close_thinking(self) -> list[ParsedEvent]:
        assert self.in_thinking
        thought = self._buffer[: len(self._buffer) - overlap(self._buffer, self._tags.closing)].rstrip()
        self._go_on("", _State.ANSWER, skips_space=True)
        return [ThinkingDelta(thought)] if thought else []

    def _step(self, events: list[ParsedEvent], final: bool) -> bool:
        if self._skips_space:
            self._buffer = self._buffer.lstrip()
            self._skips_space = not self._buffer
        if not self._buffer:
            return False
        match self._state:
            case _State.BEGINNING:
                return self._begin(final)
            case _State.THINKING:
                return self._think(events, final)
            case _State.ANSWER:
                return self._answer(final)
            case _State.TEXT:
                return self._say(events, final)
            case _State.CALL:
                return self._call(events, final)
            case _State.BARE_CALL:
                return final and self._bare_call(events)

    def _begin(self, final: bool) -> bool:
        text, opening = self._buffer.lstrip(), self._tags.opening
        if text.startswith(opening):
            self._go_on(text[len(opening) :], _State.THINKING, skips_space=True)
        elif not final and opening.startswith(text):
            return False
        else:
            self._state = _State.ANSWER
        return True

    def _think(self, events: list[ParsedEvent], final: bool) -> bool:
        thought, closing, rest = self._buffer.partition(self._tags.closing)
        if closing:
            self._emit(events, ThinkingDelta, thought.rstrip())
            self._go_on(rest, _State.ANSWER, skips_space=True)
            return True
        self._emit_certain(events, ThinkingDelta, self._tags.closing, final)
        return False

    def _answer(self, final: bool) -> bool:
        text = self._buffer.lstrip()
        begins: bool | None = False
        if self._format is not None and self._format.is_bare:
            begins = text.startswith("{") if text else None
        elif self._format is not None and self._format.may_lack_tags and not self._is_tagged:
            begins = begins_as_call(text, self._schemas)
        if begins is None and not final:
            return False
        self._state = _State.BARE_CALL if begins else _State.TEXT
        return True

    def _say(self, events: list[ParsedEvent], final: bool) -> bool:
        if self._format is None:
            self._emit(events, TextDelta, self._buffer)
            self._buffer = ""
            return False
        said, opening, rest = self._buffer.partition(self._format.opening)
        if opening:
            self._emit(events, TextDelta, said.rstrip())
            self._go_on(rest, _State.CALL)
            self._searched = self._counted = self._quotes = 0
            return True
        self._emit_certain(events, TextDelta, self._format.opening, final)
        return False

    def _call(self, events: list[ParsedEvent], final: bool) -> bool:
        assert self._format is not None
        closing = self._format.closing
        end = -1 if closing is None else self._closing_position(closing)
        if end < 0 and not final:
            return False
        if end >= 0 and closing is not None:
            body, rest, written = self._buffer[:end], self._buffer[end + len(closing) :], closing
        else:
            body, rest, written = self._buffer, "", ""
            if closing is not None:
                body = body[: len(body) - overlap(body, closing)]
        try:
            events += self._format.read(body, self._schemas)
        except ValueError as error:
            events.append(BadCall(self._format.opening + body + written, str(error)))
        self._go_on(rest, _State.TEXT, skips_space=True)
        return True

    def _closing_position(self, closing: str) -> int:
        """Position of a call's closing tag, outside the strings of JSON; -1 where it has not come yet."""
        assert self._format is not None
        if not self._format.is_json:
            return self._buffer.find(closing)
        start = max(0, self._searched - len(closing))
        while (place := self._buffer.find(closing, start)) >= 0:
            self._quotes += sum(match[1] is not None for match in _QUOTE.finditer(self._buffer, self._counted, place))
            self._counted = place
            if self._quotes % 2 == 0:
                return place
            start = place + len(closing)
        self._searched = len(self._buffer)
        return -1

    def _bare_call(self, events: list[ParsedEvent]) -> bool:
        """The end of a message that begins like a call without tags: calls of known tools and nothing else, or an answer."""
        assert self._format is not None
        body = self._buffer
        if self._format.may_lack_tags:
            body = _FENCE.sub("", body).strip().removesuffix(self._format.closing or "")
        calls: list[ParsedCall] = []
        with suppress(ValueError):
            calls = self._format.read(body, self._schemas)
        if not calls or any(call.name not in self._schemas for call in calls):
            # which may have calls in tags further on
            self._state = _State.TEXT
            return True
        events += calls
        self._buffer = ""
        return False

    def _emit_certain(
        self, events: list[ParsedEvent], kind: type[ThinkingDelta] | type[TextDelta], tag: str, final: bool
    ) -> None:
        """Give out what belongs to neither a tag nor the white space before one."""
        shown = self._buffer
        if not final:
            shown = shown[: len(shown) - overlap(shown, tag)].rstrip()
        self._emit(events, kind, shown)
        self._buffer = self._buffer[len(shown) :]

    def _emit(self, events: list[ParsedEvent], kind: type[ThinkingDelta] | type[TextDelta], text: str) -> None:
        if text:
            events.append(kind(text))

    def _go_on(self, buffer: str, state: _State, *, skips_space: bool = False) -> None:
        self._buffer, self._state, self._skips_space = buffer, state, skips_space
