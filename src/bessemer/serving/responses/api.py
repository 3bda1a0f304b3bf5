"""OpenAI's `/v1/responses`: text, thinking and calls of tools, whole or event by event, stored where the client asks for it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.assistant.messages import BadCall, Called, Event, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.responses.protocol import ResponsesRequest, ResponseStore, StoredResponse
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import EventStream, NamedEvent, named_events, until_client_leaves
from bessemer.serving.runtime.worker import ChoiceEvents, Turns
from bessemer.tokenization.tokenizer import Tokenizer


class ResponseReply:
    """A response: items of thinking, text and calls, in the order in which they came."""

    def __init__(self, asked: ResponsesRequest, tokenizer: Tokenizer, turns: Turns | None) -> None:
        """turns: None of a request that asks nothing."""
        self.identity = f"resp_{uuid.uuid4().hex}"
        self._asked = asked
        self._tokenizer = tokenizer
        self._turns = turns
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._is_open = False
        self._status = "in_progress"
        self._incomplete: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._number = 0

    @property
    def output(self) -> Sequence[dict[str, Any]]:
        """The items so far."""
        return self._output

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self._status != "in_progress"

    def whole(self, told: Iterable[ChoiceEvents]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        for _, events, *_ in told:
            for _ in self._events(events):
                pass
        return self.body()

    def start(self) -> list[NamedEvent]:
        """The events that begin a stream."""
        return [self._event(name, response=self.body()) for name in ("response.created", "response.in_progress")]

    def events(self, told: Iterable[ChoiceEvents]) -> Iterator[NamedEvent]:
        """Events of a stream for what one or more steps made."""
        for _, events, *_ in told:
            yield from self._events(events)

    def nothing(self) -> list[NamedEvent]:
        """The end of a stream to a request that asks nothing."""
        self._status = "completed"
        return [self._event("response.completed", response=self.body())]

    def failed(self, error: ApiError) -> NamedEvent:
        """The end of a stream in which something went wrong."""
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": str(error)}
        return self._event("response.failed", response=self.body())

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        asked = self._asked
        echoed = asked.model_dump(mode="json", by_alias=True, include=_ECHOED, exclude_none=True)
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "instructions": asked.instructions or None,
            "max_output_tokens": asked.max_output_tokens,
            "previous_response_id": asked.previous_response_id,
            "output": self._output,
            "usage": None if self._status == "in_progress" else self._usage(),
            **echoed,
        }

    def _events(self, events: Sequence[Event]) -> Iterator[NamedEvent]:
        for event in events:
            match event:
                case ThinkingDelta(text):
                    yield from self._add("reasoning", "reasoning_text", text)
                case TextDelta(text) | BadCall(text):
                    yield from self._add("message", "output_text", text)
                case Called(call):
                    yield from self._close()
                    written = json.dumps(call.arguments, ensure_ascii=False)
                    item = self._open(
                        {"type": "function_call", "id": _new("fc"), "call_id": call.id, "name": call.name, "arguments": ""}
                    )
                    yield self._event("response.output_item.added", output_index=self._last, item=dict(item))
                    yield self._item_event("response.function_call_arguments.delta", delta=written)
                    item["arguments"] = written
                    yield self._item_event("response.function_call_arguments.done", arguments=written, name=call.name)
                    yield from self._close()
                case RolledBack(reason):
                    raise ApiError(f"the answer was withdrawn: {reason}", status=500, kind="server_error", code="withdrawn")
                case TurnEnd(reason):
                    yield from self._close()
                    self._status = "incomplete" if reason in ("length", "refused") else "completed"
                    if self._status == "incomplete":
                        why = "max_output_tokens" if reason == "length" else "content_filter"
                        self._incomplete = {"reason": why}
                    yield self._event(f"response.{self._status}", response=self.body())
                case _:
                    pass

    def _add(self, kind: str, part: str, text: str) -> Iterator[NamedEvent]:
        """More of an item of one part, or a new one."""
        if not self._is_open or self._output[-1]["type"] != kind:
            yield from self._close()
            item: dict[str, Any] = {"type": kind, "id": _new("rs" if kind == "reasoning" else "msg")}
            own: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            item = self._open({**item, **own, "content": []})
            yield self._event("response.output_item.added", output_index=self._last, item={**item, "content": []})
            item["content"].append(_part(part, ""))
            yield self._item_event("response.content_part.added", content_index=0, part=_part(part, ""))
        self._output[-1]["content"][0]["text"] += text
        yield self._item_event(f"response.{part}.delta", content_index=0, delta=text, **_beside(part))

    def _close(self) -> Iterator[NamedEvent]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._output[-1]
        item["status"] = "completed"
        if item["type"] != "function_call":
            (part,) = item["content"]
            kind = part["type"]
            yield self._item_event(f"response.{kind}.done", content_index=0, text=part["text"], **_beside(kind))
            yield self._item_event("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        item["status"] = "in_progress"
        self._output.append(item)
        self._is_open = True
        return item

    @property
    def _last(self) -> int:
        return len(self._output) - 1

    def _usage(self) -> dict[str, Any]:
        turns = self._turns
        prompt, made, cached = (
            (0, 0, 0) if turns is None else (turns.prompt_tokens, turns.completion_tokens, turns.cached_tokens)
        )
        thought = sum(
            len(self._tokenizer.encode(part["text"], add_bos=False))
            for item in self._output
            if item["type"] == "reasoning"
            for part in item["content"]
        )
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + made,
        }

    def _item_event(self, kind: str, **content: Any) -> NamedEvent:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=self._last, **content)

    def _event(self, kind: str, **content: Any) -> NamedEvent:
        number, self._number = self._number, self._number + 1
        # what is told is of this moment: items grow
        return kind, json.loads(json.dumps({"type": kind, "sequence_number": number, **content}))


#: Of the request, what a response repeats.
_ECHOED = {
    *("model", "temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "truncation"),
    *("background", "store", "metadata"),
}


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _beside(kind: str) -> dict[str, Any]:
    """What events of a part tell beside its text."""
    return {"logprobs": []} if kind == "output_text" else {}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


class ResponsesApi:
    """The routes and what they share. Responses are kept in a store, each for the key that asked for it."""

    def __init__(self, served: Served, store: ResponseStore) -> None:
        self._served = served
        self._store = store

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/v1/responses")
        router.add_api_route("", self.create, methods=["POST"], response_model=None)
        router.add_api_route("/{identity}", self.retrieve, methods=["GET"])
        router.add_api_route("/{identity}", self.delete, methods=["DELETE"])
        router.add_api_route("/{identity}/input_items", self.inputs, methods=["GET"])
        return router

    async def create(self, request: Request) -> Response:
        asked = await read_body(ResponsesRequest, request)
        caller = caller_of(request)
        owner = caller.client.id
        served = await self._served.of(asked.model, caller)
        before = [] if asked.previous_response_id is None else (await self._find(asked.previous_response_id, owner)).messages
        tokenizer = served.engine.tokenizer
        if asked.is_probe:
            reply = ResponseReply(asked, tokenizer, None)
            begin, end = reply.start(), reply.nothing()
            if not asked.stream:
                return JSONResponse(reply.body())
            return EventStream(named_events(_at_once([*begin, *end]), reply.failed))
        with ExitStack() as held:
            held.enter_context(served.worker.admit(1))
            chat = _chat_of(asked, before, caller)
            turns = await asyncio.to_thread(served.begin, chat)
            reply = ResponseReply(asked, tokenizer, turns)
            if not asked.stream:
                return await until_client_leaves(request, self._whole(served, turns, reply, asked, caller, before))
            news = self._told(served, turns, reply, asked, owner, before, held.pop_all())
            # from here on, the generator holds the admission
            await anext(news)
            return EventStream(named_events(news, reply.failed), caller.headers)

    async def retrieve(self, identity: str, request: Request) -> dict[str, Any]:
        return (await self._find(identity, caller_of(request).client.id)).body

    async def delete(self, identity: str, request: Request) -> dict[str, Any]:
        await self._find(identity, caller_of(request).client.id)
        await self._store.drop(identity)
        return {"id": identity, "object": "response", "deleted": True}

    async def inputs(self, identity: str, request: Request) -> dict[str, Any]:
        items = (await self._find(identity, caller_of(request).client.id)).inputs
        return {"object": "list", "data": items, "has_more": False, "first_id": None, "last_id": None}

    async def _find(self, identity: str, owner: str) -> StoredResponse:
        """Another's is as one that there is not."""
        found = await self._store.find(identity)
        if found is None or found.owner != owner:
            raise ApiError(f"there is no response '{identity}'", status=404, code="response_not_found")
        return found

    async def _whole(
        self,
        served: Served,
        turns: Turns,
        reply: ResponseReply,
        asked: ResponsesRequest,
        caller: Caller,
        before: list[dict[str, Any]],
    ) -> Response:
        body = reply.whole(await turns.finish(served.worker))
        await self._keep(reply, asked, caller.client.id, before)
        return JSONResponse(body, headers=caller.headers)

    async def _told(
        self,
        served: Served,
        turns: Turns,
        reply: ResponseReply,
        asked: ResponsesRequest,
        owner: str,
        before: list[dict[str, Any]],
        place: AbstractContextManager,
    ) -> AsyncGenerator[list[NamedEvent], None]:
        """The events of a stream. The first item is an empty list, given at once: from then on closing or cancelling it ends
        the request and its admission."""
        with place:
            yield []
            yield reply.start()
            async with aclosing(turns.stream(served.worker)) as news:
                async for told in news:
                    events = list(reply.events(told))
                    if reply.is_over:
                        # a client that has read the last event may ask for it at once
                        await self._keep(reply, asked, owner, before)
                    yield events

    async def _keep(self, reply: ResponseReply, asked: ResponsesRequest, owner: str, before: list[dict[str, Any]]) -> None:
        if not asked.store:
            return
        said = asked.model_copy(update={"instructions": "", "input": [*asked.items, *_items_of(reply)]})
        items = [{"id": f"item_{place}", **item.model_dump(exclude_none=True)} for place, item in enumerate(asked.items)]
        messages = said.in_chat(before)
        beginning = len(asked.model_copy(update={"instructions": ""}).in_chat(before)) - 1
        if beginning + 1 < len(messages) and messages[beginning]["role"] == messages[beginning + 1]["role"] == "assistant":
            # the request ended with what the answer begins with
            begun, rest = messages[beginning : beginning + 2]
            messages[beginning : beginning + 2] = [begun | rest | {"content": begun["content"] + rest["content"]}]
        await self._store.keep(reply.identity, StoredResponse(owner, reply.body(), messages, items))


def _items_of(reply: ResponseReply) -> list[Any]:
    """What a response made as a later request would send it."""
    wanted = ResponsesRequest.model_validate({"model": "", "input": list(reply.output)})
    assert isinstance(wanted.input, list)
    return list(wanted.input)


def _chat_of(asked: ResponsesRequest, before: list[dict[str, Any]], caller: Caller) -> Chat:
    return Chat(
        caller,
        asked.model,
        asked.in_chat(before),
        asked.sampling,
        lambda reason: "text.format" if reason.split(" ")[0].rstrip(":") in ("json_schema", "ebnf") else None,
        token_limit=asked.max_output_tokens,
        tools=asked.offered(),
        choice=asked.choice,
        thinking_budget=asked.budget,
    )


async def _at_once(events: list[NamedEvent]) -> AsyncGenerator[list[NamedEvent], None]:
    yield events
