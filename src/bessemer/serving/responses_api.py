"""OpenAI's `/v1/responses`: text, thinking and calls, stored for those who asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.serving.bodies import ApiError, read_body
from bessemer.serving.clients import Caller, caller_of
from bessemer.serving.responses_protocol import ResponsesRequest
from bessemer.serving.responses_replies import ResponseReply
from bessemer.serving.served import Chat, Served
from bessemer.serving.stored import ResponseStore, StoredResponse
from bessemer.serving.streams import EventStream, NamedEvent, named_events, until_client_leaves
from bessemer.serving.turns import Turns


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
