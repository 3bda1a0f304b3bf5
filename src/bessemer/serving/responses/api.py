"""The routes of `/v1/responses`: text, thinking and tool calls, whole or event by event, stored where the client asks for it.

What passes is OpenAI's, and that of the Open Responses specification (https://www.openresponses.org).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import JSONResponse

from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import SOCKETS, SUMMARY
from bessemer.serving.responses.items import transcript
from bessemer.serving.responses.protocol import CompactRequest, ResponsesRequest
from bessemer.serving.responses.replies import ResponseReply, compacted
from bessemer.serving.responses.service import ResponseService
from bessemer.serving.responses.sockets import ResponseSocket
from bessemer.serving.responses.store import ResponseStore, StoredResponse
from bessemer.serving.retrieval.stores import VectorStores
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import EventStream, client_left_response, respond, until_client_leaves

#: What the model is asked for in place of a long conversation.
_SUMMARISE = (
    "Summarise this conversation for the assistant who will continue it: what was asked, decided and found out, with all "
    "names, numbers and open questions. Write the summary alone.\n\n"
)


class ResponsesApi:
    """The routes. Responses are stored for the key that asked for them. documents: what `file_search` looks in."""

    def __init__(self, served: Served, store: ResponseStore, documents: VectorStores) -> None:
        self._service = ResponseService(served, store, documents)
        #: Open WebSockets.
        self._sockets = 0

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/responses")
        router.add_api_route("", self.create, methods=["POST"], response_model=None)
        router.add_api_route("/compact", self.compact, methods=["POST"], response_model=None)
        router.add_api_route("/{identity}", self.retrieve, methods=["GET"])
        router.add_api_route("/{identity}", self.delete, methods=["DELETE"])
        router.add_api_route("/{identity}/input_items", self.inputs, methods=["GET"])
        router.add_api_websocket_route("", self.connect)
        return router

    async def create(self, request: Request) -> Response:
        body = await read_body(ResponsesRequest, request)
        caller = caller_of(request)
        previous = await self._service.previous(body.previous_response_id, caller)
        with ExitStack() as admission:
            reply, turns = await self._service.begin(body, previous, caller, admission, ResponseReply)
            if turns is None:
                events = reply.start() + reply.complete_probe()
                return EventStream([events]) if body.stream else JSONResponse(reply.body())

            async def store() -> None:
                # before the last event is sent: its reader may ask for the response at once
                await self._service.keep(reply, body, previous, caller)

            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream, after_step=store)

    async def connect(self, socket: WebSocket) -> None:
        """Responses one after the other on a WebSocket."""
        if self._sockets >= SOCKETS.most:
            await socket.close(code=1013)
            return
        self._sockets += 1
        try:
            await ResponseSocket(self._service, socket).run()
        finally:
            self._sockets -= 1

    async def compact(self, request: Request) -> Response:
        """A summary, by the model, that takes the place of a conversation."""
        body = await read_body(CompactRequest, request)
        caller = caller_of(request)
        served = await self._service.served.model_for(body.model, caller)
        text = transcript(body.in_chat(await self._service.previous(body.previous_response_id, caller)))
        if not text:
            raise ApiError("there is no conversation to compact", parameter="input", code="invalid_value")
        chat = Chat(
            caller,
            body.model,
            [{"role": "user", "content": _SUMMARISE + text}],
            lambda most: SamplingParams(max_tokens=most, temperature=0),
            lambda reason: "input",
            token_limit=SUMMARY.most,
            takes_server_tools=False,
        )
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            turns = await served.start(lambda: chat)
            step = await until_client_leaves(request.receive, turns.finish())
        if step is None:
            return client_left_response()
        return JSONResponse(compacted(step, turns), headers=dict(caller.headers))

    async def retrieve(self, identity: str, request: Request) -> dict[str, Any]:
        return (await self._find(identity, request)).body

    async def delete(self, identity: str, request: Request) -> dict[str, Any]:
        await self._find(identity, request)
        await self._service.drop(identity)
        return {"id": identity, "object": "response", "deleted": True}

    async def inputs(self, identity: str, request: Request) -> dict[str, Any]:
        items = (await self._find(identity, request)).inputs
        return {"object": "list", "data": items, "has_more": False, "first_id": None, "last_id": None}

    async def _find(self, identity: str, request: Request) -> StoredResponse:
        """Raises ApiError (404) for a response that is unknown, or of another owner."""
        if (response := await self._service.find(identity, caller_of(request))) is None:
            raise ApiError(f"there is no response '{identity}'", status=404, code="response_not_found")
        return response
