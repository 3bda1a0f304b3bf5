"""Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`, and their responses, whole or event by event."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.assistant.messages import BadCall, Called, EndReason, Event, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.anthropic.protocol import CountRequest, MessagesRequest
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import EventStream, NamedEvent, named_events, until_client_leaves
from bessemer.serving.runtime.worker import ChoiceEvents, Turns

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


#: Where the API lies.
PREFIX = "/v1/messages"
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_PING = 'event: ping\ndata: {"type": "ping"}\n\n'
_PARAMETERS = {"stop": "stop_sequences"}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    kind = _ERRORS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": f"req_{uuid.uuid4().hex}"}


def _failed(error: ApiError) -> NamedEvent:
    return "error", error_body(error)


class AnthropicApi:
    """The routes and what they share."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix=PREFIX)
        router.add_api_route("", self.message, methods=["POST"], response_model=None)
        router.add_api_route("/count_tokens", self.count, methods=["POST"], response_model=None)
        return router

    async def message(self, request: Request) -> Response:
        asked = await read_body(MessagesRequest, request)
        caller = caller_of(request)
        served = await self._served.of(asked.model, caller)
        with ExitStack() as held:
            held.enter_context(served.worker.admit(1))
            turns = await asyncio.to_thread(lambda: served.begin(_chat_of(asked, caller)))
            reply = MessagesReply(asked.model, turns)
            if not asked.stream:
                return await until_client_leaves(request, self._whole(served, turns, reply, caller))
            news = self._told(served, turns, reply, held.pop_all())
            # from here on, the generator holds the admission
            await anext(news)
            return EventStream(named_events(news, _failed), caller.headers, _PING)

    async def count(self, request: Request) -> dict[str, Any]:
        asked = await read_body(CountRequest, request)
        caller = caller_of(request)
        served = await self._served.of(asked.model, caller)
        chat = _chat_of(
            MessagesRequest(**{name: getattr(asked, name) for name in asked.model_fields_set}, max_tokens=1), caller
        )
        return {"input_tokens": await self._served.aside(lambda: served.count(chat))}

    async def _whole(self, served: Served, turns: Turns, reply: MessagesReply, caller: Caller) -> Response:
        return JSONResponse(reply.whole(await turns.finish(served.worker)), headers=caller.headers)

    async def _told(
        self, served: Served, turns: Turns, reply: MessagesReply, place: AbstractContextManager
    ) -> AsyncGenerator[list[NamedEvent], None]:
        """The events of a stream. The first item is an empty list, given at once: from then on closing or cancelling it ends
        the requests and their admission."""
        with place:
            yield []
            # before the prompt is read
            yield [reply.start()]
            async with aclosing(turns.stream(served.worker)) as news:
                async for told in news:
                    yield list(reply.events(told))


def _chat_of(asked: MessagesRequest, caller: Caller) -> Chat:
    return Chat(
        caller,
        asked.model,
        asked.in_chat(),
        asked.sampling,
        lambda reason: _PARAMETERS.get(reason.partition(" ")[0]),
        token_limit=asked.max_tokens,
        tools=asked.offered(),
        choice=asked.choice,
        thinking_budget=asked.budget,
    )
