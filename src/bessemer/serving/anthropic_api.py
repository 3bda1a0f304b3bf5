"""Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.serving.anthropic_protocol import CountRequest, MessagesRequest
from bessemer.serving.anthropic_replies import MessagesReply
from bessemer.serving.bodies import ApiError, read_body
from bessemer.serving.clients import Caller, caller_of
from bessemer.serving.served import Chat, Served
from bessemer.serving.streams import EventStream, NamedEvent, named_events, until_client_leaves
from bessemer.serving.turns import Turns

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
