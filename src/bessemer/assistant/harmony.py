"""The format of gpt-oss: several messages on channels, one of which is the answer (OpenAI, "Harmony response format", 2025).

    <|channel|>analysis<|message|>thinking<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{JSON}<|call|>
    <|start|>assistant<|channel|>final<|message|>answer<|return|>

The prompt ends with `<|start|>assistant`. The recipient may also come before the channel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum, auto

from bessemer.assistant.grammar import ANY_TEXT, MessageForm, Rules, literal
from bessemer.assistant.messages import BadCall, TextDelta, ThinkingDelta
from bessemer.assistant.parser import MessageParser, ParsedCall, ParsedEvent, Schemas, ThinkingTags, read_named_call
from bessemer.assistant.tool_formats import ToolFormat
from bessemer.assistant.written import Piece, in_json
from bessemer.inference.sampling.params import overlap

_CHANNEL, _MESSAGE, _END, _START, _CONSTRAIN, _CALL, _RETURN = (
    f"<|{name}|>" for name in ("channel", "message", "end", "start", "constrain", "call", "return")
)
#: Tags that end a message's content.
_ENDS = (_END, _CALL, _RETURN, _START)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")


class _State(Enum):
    HEADER = auto()
    THINKING = auto()
    TEXT = auto()
    CALL = auto()


class HarmonyParser(MessageParser):
    """Parses the messages that gpt-oss writes in one turn. schemas: of the offered tools; None: calls are text."""

    def __init__(self, schemas: Schemas | None, *, in_thinking: bool = False) -> None:
        super().__init__()
        self._reads_calls = schemas is not None
        self._state = _State.THINKING if in_thinking else _State.HEADER
        #: The current message's header with its tags, and its recipient.
        self._header = self._recipient = ""

    @property
    def in_thinking(self) -> bool:
        return self._state is _State.THINKING

    @property
    def is_undecided(self) -> bool:
        return self._state is _State.HEADER

    @property
    def may_think_again(self) -> bool:
        """After a text or a call, another message may be thinking."""
        return self._state in (_State.TEXT, _State.CALL)

    def close_thinking(self) -> list[ParsedEvent]:
        assert self.in_thinking
        thought = self._buffer[: len(self._buffer) - self._undecided()]
        self._buffer, self._state = "", _State.HEADER
        return [ThinkingDelta(thought)] if thought else []

    def _step(self, events: list[ParsedEvent], final: bool) -> bool:
        if not self._buffer:
            return False
        if self._state is _State.HEADER:
            return self._read_header(events, final)
        place, tag = self._next_end()
        if self._state is _State.CALL:
            if place < 0 and not final:
                return False
            self._add_call(events, self._buffer if place < 0 else self._buffer[:place], tag)
        else:
            kept = 0 if final else self._undecided()
            shown = self._buffer[:place] if place >= 0 else self._buffer[: len(self._buffer) - kept]
            if shown:
                events.append(ThinkingDelta(shown) if self._state is _State.THINKING else TextDelta(shown))
            if place < 0:
                self._buffer = self._buffer[len(shown) :]
                return False
        self._buffer = "" if place < 0 else self._buffer[place + (0 if tag == _START else len(tag)) :]
        self._state = _State.HEADER
        return True

    def _read_header(self, events: list[ParsedEvent], final: bool) -> bool:
        header, tag, rest = self._buffer.partition(_MESSAGE)
        if not tag:
            if final:
                # text without a channel is the answer
                words = "" if _START in header or _CHANNEL in header else header
                events += [TextDelta(words)] if words.strip() else []
                self._buffer = ""
            return False
        self._header = header + tag
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        self._recipient = recipient[1] if recipient is not None else ""
        if self._recipient and self._reads_calls:
            self._state = _State.CALL
        else:
            self._state = _State.THINKING if channel is not None and channel[1] == "analysis" else _State.TEXT
        self._buffer = rest
        return True

    def _add_call(self, events: list[ParsedEvent], body: str, tag: str) -> None:
        try:
            events.append(read_named_call(self._recipient, body))
        except ValueError as error:
            events.append(BadCall(self._header + body + (tag if tag != _START else ""), str(error)))

    def _next_end(self) -> tuple[int, str]:
        """Position and tag of the content's end; -1 where it has not come yet."""
        ends = [(place, tag) for tag in _ENDS if (place := self._buffer.find(tag)) >= 0]
        return min(ends, default=(-1, ""))

    def _undecided(self) -> int:
        """Characters at the end that may begin a tag."""
        return max(overlap(self._buffer, tag) for tag in _ENDS)


class HarmonyFormat(ToolFormat):
    """The format of gpt-oss: channels instead of tags."""

    def tags(self, *, with_calls: bool) -> frozenset[str]:
        return frozenset(self.inner)

    @property
    def inner_tags(self) -> frozenset[str]:
        return frozenset((_CHANNEL, _MESSAGE, _END, _START, _CONSTRAIN))

    def written(self, thinking: str, text: str, calls: Sequence[ParsedCall], *, is_open: bool) -> list[Piece]:
        """Messages on channels; a text beside a call is a preamble on `commentary`. Generation ends at a call, so there is one.

        Raises ValueError for several calls, and where the prompt has opened thinking.
        """
        if len(calls) > 1 or is_open:
            raise ValueError("gpt-oss calls one tool in a turn")
        channel, message, start = (Piece(tag, True) for tag in (_CHANNEL, _MESSAGE, _START))
        again = [Piece(_END, True), start, Piece("assistant")]
        pieces: list[Piece] = [channel, Piece("analysis"), message, Piece(thinking), *again] if thinking else []
        if not calls:
            return [*pieces, channel, Piece("final"), message, Piece(text)]
        if text:
            pieces += [channel, Piece("commentary"), message, Piece(text), *again]
        name, arguments = calls[0]
        return [
            *pieces,
            *(Piece(f" to=functions.{name}"), channel, Piece("commentary json"), message, Piece(in_json(arguments))),
        ]

    def parser(self, schemas: Schemas | None, *, in_thinking: bool = False, is_tagged: bool = False) -> MessageParser:
        return HarmonyParser(schemas, in_thinking=in_thinking)

    def grammar(self, wanted: MessageForm, control_id: Callable[[str], int | None]) -> str:
        rules = Rules(control_id)
        channel, message, start = map(rules.tag, (_CHANNEL, _MESSAGE, _START))
        begin = ""
        if wanted.thinking in ("open", "may"):
            thought = f"{rules.up_to(_END)} {start} {literal('assistant')}"
            opened = f"{channel} {literal('analysis')} {message} {thought}"
            begin = thought if wanted.thinking == "open" else f"({opened})?"
        said = ANY_TEXT if wanted.answer is None else rules.form(wanted.answer)
        answer = f"{channel} {literal('final')} {message} {said}"
        calls = " | ".join(
            f"{channel} {literal(f'commentary to=functions.{tool.name} ')} {rules.tag(_CONSTRAIN)} {literal('json')} {message} "
            f"{rules.json(tool.parameters)}"
            for tool in wanted.tools
        )
        if not wanted.tools:
            return rules.text(f"{begin} {answer}")
        return rules.text(f"{begin} ({calls})" if wanted.must_call else f"{begin} ({answer} | {calls})")


HARMONY = HarmonyFormat(
    f"{_CHANNEL}commentary",
    _CALL,
    lambda body, schemas: [],
    inner=(_CHANNEL, _MESSAGE, _END, _START, _CONSTRAIN, _CALL, _RETURN),
    one_call=True,
    thinking=ThinkingTags(
        f"{_CHANNEL}analysis{_MESSAGE}", _END, after=f"{_START}assistant", inside="", answer=f"{_CHANNEL}final{_MESSAGE}"
    ),
)
