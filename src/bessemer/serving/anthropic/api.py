"""Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`, and their responses, whole or event by event."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from bessemer.assistant.messages import BadCall, Called, EndReason, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.anthropic.protocol import CountRequest, MessagesRequest
from bessemer.serving.runtime.bodies import ApiError, read_body, withdrawn
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import Reply, named_events, respond, server_sent_event
from bessemer.serving.runtime.worker import ChoiceEvents, Turns

#: The path below which errors have Anthropic's form.
PREFIX = "/v1/messages"
#: Anthropic's `stop_reason` of a turn.
_STOP: dict[EndReason, str] = {
    "answer": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "rounds": "tool_use",
    "refused": "refusal",
}
#: Anthropic's type of an error by its HTTP status.
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
#: Every how many signs of life in a silence is more than a ping.
_EVENT_EVERY = 60
#: Anthropic's name of a sampling parameter, where it differs from the engine's.
_PARAMETERS = {"stop": "stop_sequences"}
_NamedEvent = tuple[str, dict[str, Any]]


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    kind = _ERRORS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": f"req_{uuid.uuid4().hex}"}


class MessagesReply(Reply):
    """A message: blocks of thinking, text and tool calls in their order."""

    def __init__(self, model: str, turns: Turns) -> None:
        self._model = model
        self._turns = turns
        self._identity = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[dict[str, Any]] = []
        self._has_open_block = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        for _ in self._events(step):
            pass
        return self._message(self._blocks, self._usage())

    def start(self) -> str:
        """Sent before the prompt is computed: only the last event knows how much of it was cached."""
        return named_events([self._event("message_start", message=self._message([], self._usage() | {"output_tokens": 0}))])

    def events(self, step: Iterable[ChoiceEvents]) -> str:
        return named_events(self._events(step))

    def failed(self, error: ApiError) -> str:
        return server_sent_event(error_body(error), "error")

    def sign_of_life(self, quiet: int) -> str:
        ping = server_sent_event({"type": "ping"}, "ping")
        if quiet % _EVENT_EVERY:
            return ping
        # Anthropic's clients drop pings, and Claude Code, from 2.1.198 on, a stream without other events for 300 s
        if self._has_open_block and (kind := self._blocks[-1]["type"]) in ("text", "thinking"):
            return ping + named_events([self._block_event("delta", delta={"type": f"{kind}_delta", kind: ""})])
        return ping + named_events([self._event("message_delta", delta=self._stop, usage={"output_tokens": 0})])

    def _events(self, step: Iterable[ChoiceEvents]) -> Iterator[_NamedEvent]:
        for event in (event for _, events, *_ in step for event in events):
            match event:
                case ThinkingDelta(text):
                    yield from self._add_text("thinking", "thinking", text)
                case TextDelta(text) | BadCall(text):
                    yield from self._add_text("text", "text", text)
                case Called(call):
                    yield from self._close()
                    block = {"type": "tool_use", "id": f"toolu_{self._identity[-12:]}{call.id}", "name": call.name}
                    self._blocks.append({**block, "input": dict(call.arguments)})
                    self._has_open_block = True
                    yield self._block_event("start", content_block={**block, "input": {}})
                    arguments = json.dumps(call.arguments, ensure_ascii=False)
                    yield self._block_event("delta", delta={"type": "input_json_delta", "partial_json": arguments})
                    yield from self._close()
                case RolledBack(reason):
                    raise withdrawn(reason)
                case TurnEnd():
                    yield from self._close()
                    self._end(event)
                    yield self._event("message_delta", delta=self._stop, usage=self._usage())
                    yield self._event("message_stop")

    def _add_text(self, kind: Literal["text", "thinking"], key: str, text: str) -> Iterator[_NamedEvent]:
        """More text of the last block, or a new block."""
        if not self._has_open_block or self._blocks[-1]["type"] != kind:
            yield from self._close()
            empty = {"type": kind, key: ""} | ({"signature": ""} if kind == "thinking" else {})
            self._blocks.append(dict(empty))
            self._has_open_block = True
            yield self._block_event("start", content_block=empty)
        self._blocks[-1][key] += text
        yield self._block_event("delta", delta={"type": f"{kind}_delta", key: text})

    def _close(self) -> Iterator[_NamedEvent]:
        if not self._has_open_block:
            return
        self._has_open_block = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            # clients require a signature and send it back; it is never checked
            block["signature"] = hashlib.sha256(block["thinking"].encode()).hexdigest()
            yield self._block_event("delta", delta={"type": "signature_delta", "signature": block["signature"]})
        yield self._block_event("stop")

    def _end(self, end: TurnEnd) -> None:
        has_calls = any(block["type"] == "tool_use" for block in self._blocks)
        reason = "end_turn" if end.reason == "rounds" and not has_calls else _STOP[end.reason]
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
        """Tokens as Anthropic counts them: `input_tokens` leaves out those read from the cache."""
        cached = self._turns.cached_tokens
        return {
            "input_tokens": self._turns.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._turns.completion_tokens,
        }

    def _block_event(self, what: str, **content: Any) -> _NamedEvent:
        return self._event(f"content_block_{what}", index=len(self._blocks) - 1, **content)

    def _event(self, kind: str, **content: Any) -> _NamedEvent:
        return kind, {"type": kind, **content}


class AnthropicApi:
    """The routes."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def router(self) -> APIRouter:
        router = APIRouter(prefix=PREFIX)
        router.add_api_route("", self.message, methods=["POST"], response_model=None)
        router.add_api_route("/count_tokens", self.count, methods=["POST"], response_model=None)
        return router

    async def message(self, request: Request) -> Response:
        body = await read_body(MessagesRequest, request)
        caller = caller_of(request)
        served = await self._served.model_for(body.model, caller)
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            turns = await served.start(lambda: _chat(body, caller))
            reply = MessagesReply(body.model, turns)
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream)

    async def count(self, request: Request) -> dict[str, Any]:
        body = await read_body(CountRequest, request)
        caller = caller_of(request)
        served = await self._served.model_for(body.model, caller)
        chat = _chat(MessagesRequest(**{name: getattr(body, name) for name in body.model_fields_set}, max_tokens=1), caller)
        return {"input_tokens": await self._served.run_in_thread(lambda: served.count(chat))}


def _chat(body: MessagesRequest, caller: Caller) -> Chat:
    return Chat(
        caller,
        body.model,
        body.in_chat(),
        body.sampling,
        lambda reason: _PARAMETERS.get(reason.partition(" ")[0]),
        token_limit=body.max_tokens,
        tools=body.offered(),
        choice=body.choice,
        thinking_budget=body.budget,
        takes_server_tools=body.tool_choice is None or body.tool_choice.type != "none",
    )
