"""Completions that a turn needs, and the draft of a message: tokens become text, text becomes thinking, answer and tool
calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.messages import BadCall, Called, DraftEvent, Message, MessagePart, TextDelta, ThinkingDelta, ToolCall
from bessemer.assistant.parser import MessageParser, ParsedCall, ParsedEvent
from bessemer.inference.sampling.params import SamplingParams, StopStrings
from bessemer.tokenization.prompts import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Generation:
    """A completion that a turn needs. token_ids: the prompt for an engine. messages, tools: the same for an API."""

    token_ids: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    params: SamplingParams


@dataclass(frozen=True)
class Delta:
    """The next part of a completion: tokens from an engine; text, thinking and calls from an API.

    log_probs: of each token, in nats; None where unknown. weight_version: of the weights that sampled the tokens.
    """

    token_ids: Sequence[int] = ()
    log_probs: Sequence[float] | None = None
    weight_version: int = 0
    text: str = ""
    thinking: str = ""
    calls: Sequence[ParsedCall | BadCall] = ()
    finish_reason: str | None = None


class MessageText:
    """Decodes the tokens of one message, across completions. Of control tokens, only `tags` are shown; an end token is left
    out."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, tags: Collection[str], *, continues: bool = False) -> None:
        """continues: whether other tokens of the same message come before."""
        self._decoder = StreamingDecoder(tokenizer, goes_on=continues)
        self._stops = StopStrings(params.stop, params.include_stop)
        self._min_tokens = params.min_tokens
        self._fed = 0
        self._ends = {*tokenizer.eos_ids, *params.stop_token_ids}
        self._tags = {id: tag for tag in tags if (id := tokenizer.control_id(tag)) is not None}

    def feed(self, ids: Sequence[int], finish_reason: str | None) -> str:
        """The text that these tokens complete."""
        if finish_reason == "stop" and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        text = ""
        for id in ids:
            tag = self._tags.get(id)
            self._fed += 1
            added = self._decoder.feed([id]) if tag is None else self._decoder.flush() + tag
            text += self._stops.feed(added, search=self._fed > self._min_tokens)
        return text

    @property
    def stopped_by(self) -> str:
        """The stop string that ended the text; empty where none did."""
        return self._stops.matched

    def flush(self) -> str:
        """The remaining text, when no more tokens come."""
        return self._stops.feed(self._decoder.flush(), search=self._fed > self._min_tokens) + self._stops.flush()


class MessageDraft:
    """The message so far: `thinking`, `text`, and `calls` in their order. generated: tokens sampled for it."""

    def __init__(self, parser: MessageParser, text: MessageText | None, next_call_id: Callable[[], str]) -> None:
        """text: decodes an engine's tokens; None for an API."""
        self.thinking = ""
        self.text = ""
        self.calls: list[ToolCall | BadCall] = []
        self.generated = 0
        self.is_thinking_cut = False
        self.parser = parser
        self._text = text
        self._next_call_id = next_call_id

    @property
    def stopped_by(self) -> str:
        """The stop string that ended an engine's message; empty where none did."""
        return "" if self._text is None else self._text.stopped_by

    @property
    def is_empty(self) -> bool:
        return not (self.generated or self.thinking or self.text or self.calls)

    def take(self, delta: Delta) -> list[DraftEvent]:
        self.generated += len(delta.token_ids)
        thinking: list[ParsedEvent] = [ThinkingDelta(delta.thinking)] if delta.thinking else []
        text = delta.text if self._text is None else self._text.feed(delta.token_ids, delta.finish_reason)
        return self._add([*thinking, *self.parser.feed(text), *delta.calls])

    def close_thinking(self, answer: str = "") -> list[DraftEvent]:
        """End the thinking. Sets `is_thinking_cut` if it was still open. answer: text that is parsed after it."""
        events = [] if self._text is None else self.parser.feed(self._text.flush())
        self.is_thinking_cut = self.parser.in_thinking
        if self.is_thinking_cut:
            events += self.parser.close_thinking()
        return self._add([*events, *self.parser.feed(answer)])

    def finish(self) -> list[DraftEvent]:
        """The remaining events, when no more deltas come."""
        events = [] if self._text is None else self.parser.feed(self._text.flush())
        return self._add([*events, *self.parser.finish()])

    def message(self, *, is_derived: bool) -> Message:
        """The message; calls that cannot be read stay in its text. is_derived: as in `Message`."""
        text = self.text + "".join(call.text for call in self.calls if isinstance(call, BadCall))
        parts = (MessagePart(text, "assistant"),) if text else ()
        calls = tuple(call for call in self.calls if isinstance(call, ToolCall))
        return Message("assistant", parts, self.thinking, calls, is_derived=is_derived)

    def _add(self, parsed: Sequence[ParsedEvent]) -> list[DraftEvent]:
        events: list[DraftEvent] = []
        for event in parsed:
            match event:
                case ThinkingDelta(text):
                    self.thinking += text
                    events.append(event)
                case TextDelta(text):
                    self.text += text
                    events.append(event)
                case BadCall():
                    self.calls.append(event)
                    events.append(event)
                case ParsedCall(name, arguments):
                    call = ToolCall(self._next_call_id(), name, arguments)
                    self.calls.append(call)
                    events.append(Called(call))
        return events
