"""Responses in Anthropic's form: whole, or event by event."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from bessemer.assistant.events import BadCall, Called, EndReason, Event, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.bodies import ApiError
from bessemer.serving.streams import NamedEvent
from bessemer.serving.turns import ChoiceEvents, Turns

_STOP: dict[EndReason, str] = {
    "answer": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "rounds": "tool_use",
    "refused": "refusal",
}
_Kind = Literal["text", "thinking", "tool_use"]


class MessagesReply:
    """The response to a request for a message: blocks of thinking, text and calls, in the order in which they came."""

    def __init__(self, model: str, turns: Turns) -> None:
        self._model = model
        self._turns = turns
        self._identity = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def whole(self, told: Iterable[ChoiceEvents]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        for _, events, *_ in told:
            for _ in self._events(events):
                pass
        return self._message(self._blocks, self._usage())

    def start(self) -> NamedEvent:
        """The event that begins a stream, before the prompt is read: what of it is in the cache, the last event tells."""
        return self._event("message_start", message=self._message([], self._usage() | {"output_tokens": 0}))

    def events(self, told: Iterable[ChoiceEvents]) -> Iterator[NamedEvent]:
        """Events of a stream for what one or more steps made."""
        for _, events, *_ in told:
            yield from self._events(events)

    def _events(self, events: Sequence[Event]) -> Iterator[NamedEvent]:
        for event in events:
            match event:
                case ThinkingDelta(text):
                    yield from self._add("thinking", "thinking", text)
                case TextDelta(text) | BadCall(text):
                    yield from self._add("text", "text", text)
                case Called(call):
                    yield from self._close()
                    block = {"type": "tool_use", "id": f"toolu_{self._identity[-12:]}{call.id}", "name": call.name}
                    self._blocks.append({**block, "input": dict(call.arguments)})
                    self._is_open = True
                    yield self._block_event("start", content_block={**block, "input": {}})
                    written = json.dumps(call.arguments, ensure_ascii=False)
                    yield self._block_event("delta", delta={"type": "input_json_delta", "partial_json": written})
                    yield from self._close()
                case RolledBack(reason):
                    raise ApiError(f"the answer was withdrawn: {reason}", status=500, kind="api_error")
                case TurnEnd():
                    yield from self._close()
                    self._end(event)
                    yield self._event("message_delta", delta=self._stop, usage=self._usage())
                    yield self._event("message_stop")
                case _:
                    pass

    def _add(self, kind: _Kind, key: str, text: str) -> Iterator[NamedEvent]:
        """More of a block, or a new one."""
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._close()
            empty = {"type": kind, key: ""} | ({"signature": ""} if kind == "thinking" else {})
            self._blocks.append(dict(empty))
            self._is_open = True
            yield self._block_event("start", content_block=empty)
        self._blocks[-1][key] += text
        yield self._block_event("delta", delta={"type": f"{kind}_delta", key: text})

    def _close(self) -> Iterator[NamedEvent]:
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            # clients send it back with the thinking; nothing is told by it
            block["signature"] = hashlib.sha256(block["thinking"].encode()).hexdigest()
            yield self._block_event("delta", delta={"type": "signature_delta", "signature": block["signature"]})
        yield self._block_event("stop")

    def _end(self, end: TurnEnd) -> None:
        calls = any(block["type"] == "tool_use" for block in self._blocks)
        reason = "end_turn" if end.reason == "rounds" and not calls else _STOP[end.reason]
        if reason == "end_turn" and end.stopped_by:
            reason = "stop_sequence"
        self._stop = {"stop_reason": reason, "stop_sequence": end.stopped_by or None}

    def _message(self, blocks: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._identity,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(blocks),
            **self._stop,
            "usage": usage,
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens as Anthropic counts them: those found in the cache are not among the others of the prompt."""
        cached = self._turns.cached_tokens
        return {
            "input_tokens": self._turns.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._turns.completion_tokens,
        }

    def _block_event(self, what: str, **content: Any) -> NamedEvent:
        return self._event(f"content_block_{what}", index=len(self._blocks) - 1, **content)

    def _event(self, kind: str, **content: Any) -> NamedEvent:
        return kind, {"type": kind, **content}
