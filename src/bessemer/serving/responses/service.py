"""Making responses for the routes and for WebSockets: from a request to its turns, and what is stored of the result."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from bessemer.serving.responses.protocol import ResponsesRequest
from bessemer.serving.responses.replies import ResponseReply
from bessemer.serving.responses.store import ResponseStore, StoredResponse
from bessemer.serving.retrieval.stores import VectorStores, sources_for
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.worker import Turns

SomeReply = TypeVar("SomeReply", bound=ResponseReply)


class ResponseService:
    """Responses are stored for the key that asked for them. documents: what `file_search` looks in."""

    def __init__(self, served: Served, store: ResponseStore, documents: VectorStores) -> None:
        self.served = served
        self._store = store
        self._documents = documents

    async def begin(
        self,
        body: ResponsesRequest,
        previous: list[dict[str, Any]],
        caller: Caller,
        admission: ExitStack,
        kind: type[SomeReply],
        *,
        is_probe: bool = False,
    ) -> tuple[SomeReply, Turns | None]:
        """The response that is to be made, and its turns; None where there is nothing to answer. Raises ApiError."""
        served = await self.served.model_for(body.model, caller)
        if is_probe or body.is_probe:
            return kind(body, served.engine.tokenizer, None), None
        admission.enter_context(await served.worker.place(1, caller))
        chat = _chat(body, previous, caller)
        question = chat.last_question
        if (tool := body.file_search) is not None:
            sources = await sources_for(question, tool.wanted(), self._documents, caller.client, "input")
            chat = replace(chat, sources=sources)
        turns = await served.start(lambda: chat)
        return kind(body, served.engine.tokenizer, turns, question), turns

    async def previous(self, identity: str | None, caller: Caller) -> list[dict[str, Any]]:
        """The messages of the response that a request follows. Raises ApiError (404)."""
        if identity is None:
            return []
        if (response := await self.find(identity, caller)) is None:
            raise ApiError(
                f"there is no response '{identity}' to follow",
                status=404,
                parameter="previous_response_id",
                code="previous_response_not_found",
            )
        return response.messages

    async def keep(
        self, reply: ResponseReply, body: ResponsesRequest, previous: list[dict[str, Any]], caller: Caller
    ) -> StoredResponse | None:
        """Store a response that is over, where its client asks for it; what is stored, or would be. None for another."""
        if not reply.is_over:
            return None
        stored = _stored(reply, body, caller.client.id, previous)
        if body.store:
            await self._store.keep(reply.identity, stored)
        return stored

    async def find(self, identity: str, caller: Caller) -> StoredResponse | None:
        """The caller's response of that id; None for one that is unknown, or of somebody else."""
        response = await self._store.find(identity)
        return response if response is not None and response.owner == caller.client.id else None

    async def drop(self, identity: str) -> None:
        await self._store.drop(identity)


def _stored(reply: ResponseReply, request: ResponsesRequest, owner: str, previous: list[dict[str, Any]]) -> StoredResponse:
    output = ResponsesRequest.model_validate({"model": "", "input": list(reply.output)}).items
    conversation = request.model_copy(update={"instructions": "", "input": [*request.items, *output]})
    items = [{"id": f"item_{index}", **item.model_dump(exclude_none=True)} for index, item in enumerate(request.items)]
    messages = conversation.in_chat(previous)
    last = len(request.model_copy(update={"instructions": ""}).in_chat(previous)) - 1
    if last + 1 < len(messages) and messages[last]["role"] == messages[last + 1]["role"] == "assistant":
        # the request's last message was the beginning of the answer: join the two
        beginning, rest = messages[last : last + 2]
        messages[last : last + 2] = [beginning | rest | {"content": beginning["content"] + rest["content"]}]
    return StoredResponse(owner, reply.body(), messages, items)


def _chat(request: ResponsesRequest, previous: list[dict[str, Any]], caller: Caller) -> Chat:
    return Chat(
        caller,
        request.model,
        request.in_chat(previous),
        request.sampling,
        lambda reason: "text.format" if reason.split(" ")[0].rstrip(":") in ("json_schema", "ebnf") else None,
        token_limit=request.max_output_tokens,
        tools=request.offered(),
        choice=request.choice,
        thinking_budget=request.budget,
        takes_server_tools=request.tool_choice != "none",
    )
