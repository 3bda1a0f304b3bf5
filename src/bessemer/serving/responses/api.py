"""OpenAI's `/v1/responses`: text, thinking and tool calls, whole or event by event, stored where the client asks for it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.assistant.messages import BadCall, Called, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.responses.protocol import ResponsesRequest, ResponseStore, StoredResponse
from bessemer.serving.retrieval.annotations import AnswerCitations, call_result
from bessemer.serving.retrieval.stores import VectorStores, sources_for
from bessemer.serving.runtime.bodies import ApiError, read_body, withdrawn
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import PING, EventStream, Reply, named_events, respond
from bessemer.serving.runtime.worker import ChoiceEvents, Turns
from bessemer.tokenization.tokenizer import Tokenizer

#: Every how many signs of life in a silence is an event: it repeats the response, with the request's tools.
_EVENT_EVERY = 15
#: Name and body of a server-sent event.
_NamedEvent = tuple[str, dict[str, Any]]


class ResponseReply(Reply):
    """A response: the search, where one was made, and items of thinking, text and tool calls in their order."""

    def __init__(self, request: ResponsesRequest, tokenizer: Tokenizer, turns: Turns | None, question: str = "") -> None:
        """turns: None for a probe, which has no input. question: what was searched for."""
        self.identity = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._tokenizer = tokenizer
        self._turns = turns
        self._question = question
        self._sources = None if turns is None else turns.sources
        #: Of the message that is being written.
        self._citations: AnswerCitations | None = None
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._has_open_item = False
        self._status = "in_progress"
        self._incomplete: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._sequence_number = 0

    @property
    def output(self) -> Sequence[dict[str, Any]]:
        return self._output

    @property
    def is_over(self) -> bool:
        """Whether the last event was made."""
        return self._status != "in_progress"

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        for _ in (*self._search(), *self._events(step)):
            pass
        return self.body()

    def start(self) -> str:
        begun = [self._event(name, response=self.body()) for name in ("response.created", "response.in_progress")]
        return named_events([*begun, *self._search()])

    def events(self, step: Iterable[ChoiceEvents]) -> str:
        return named_events(self._events(step))

    def sign_of_life(self, quiet: int) -> str:
        # Codex takes no comment for one, and drops a stream without events for 300 s
        if self.is_over or quiet % _EVENT_EVERY:
            return PING
        return named_events([self._event("response.in_progress", response=self.body())])

    def complete_probe(self) -> str:
        """The last event of a request without input."""
        self._status = "completed"
        return named_events([self._event("response.completed", response=self.body())])

    def failed(self, error: ApiError) -> str:
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": str(error)}
        return named_events([self._event("response.failed", response=self.body())])

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        request = self._request
        echoed = request.model_dump(mode="json", by_alias=True, include=_ECHOED, exclude_none=True)
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "instructions": request.instructions or None,
            "max_output_tokens": request.max_output_tokens,
            "previous_response_id": request.previous_response_id,
            "output": self._output,
            "usage": self._usage() if self.is_over else None,
            **echoed,
        }

    def _search(self) -> Iterator[_NamedEvent]:
        """The item of the search, which is made before the model answers."""
        if self._sources is None:
            return
        item = self._open({"type": "file_search_call", "id": _new_id("fs"), "queries": [self._question], "results": None})
        yield self._event("response.output_item.added", output_index=self._last, item=item)
        for state in ("in_progress", "searching", "completed"):
            yield self._item_event(f"response.file_search_call.{state}")
        if self._request.shows_results:
            item["results"] = [call_result(hit) for hit in self._sources]
        yield from self._close()

    def _events(self, step: Iterable[ChoiceEvents]) -> Iterator[_NamedEvent]:
        for event in (event for _, events, *_ in step for event in events):
            match event:
                case ThinkingDelta(text):
                    yield from self._add_text("reasoning", "reasoning_text", text)
                case TextDelta(text) | BadCall(text):
                    yield from self._add_text("message", "output_text", text)
                case Called(call):
                    yield from self._close()
                    arguments = json.dumps(call.arguments, ensure_ascii=False)
                    item = self._open(
                        {"type": "function_call", "id": _new_id("fc"), "call_id": call.id, "name": call.name, "arguments": ""}
                    )
                    yield self._event("response.output_item.added", output_index=self._last, item=item)
                    yield self._item_event("response.function_call_arguments.delta", delta=arguments)
                    item["arguments"] = arguments
                    yield self._item_event("response.function_call_arguments.done", arguments=arguments, name=call.name)
                    yield from self._close()
                case RolledBack(reason):
                    raise withdrawn(reason)
                case TurnEnd(reason):
                    yield from self._close()
                    self._status = "incomplete" if reason in ("length", "refused") else "completed"
                    if self._status == "incomplete":
                        self._incomplete = {"reason": "max_output_tokens" if reason == "length" else "content_filter"}
                    yield self._event(f"response.{self._status}", response=self.body())

    def _add_text(self, kind: str, part_kind: str, text: str) -> Iterator[_NamedEvent]:
        """More text of the last item, or a new item with one part."""
        if not self._has_open_item or self._output[-1]["type"] != kind:
            yield from self._close()
            item: dict[str, Any] = {"type": kind, "id": _new_id("rs" if kind == "reasoning" else "msg")}
            own: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            item = self._open({**item, **own, "content": []})
            yield self._event("response.output_item.added", output_index=self._last, item=item)
            item["content"].append(_part(part_kind))
            yield self._item_event("response.content_part.added", content_index=0, part=_part(part_kind))
            self._citations = None if kind != "message" or self._sources is None else AnswerCitations(self._sources)
        part = self._output[-1]["content"][0]
        part["text"] += text
        yield self._item_event(f"response.{part_kind}.delta", content_index=0, delta=text, **_log_probs(part_kind))
        for annotation in self._citations.feed(text) if self._citations is not None else ():
            part["annotations"].append(annotation)
            number = len(part["annotations"]) - 1
            named = {"content_index": 0, "annotation_index": number, "annotation": annotation}
            yield self._item_event("response.output_text.annotation.added", **named)

    def _close(self) -> Iterator[_NamedEvent]:
        if not self._has_open_item:
            return
        self._has_open_item = False
        item = self._output[-1]
        item["status"] = "completed"
        if item["type"] in ("reasoning", "message"):
            (part,) = item["content"]
            kind = part["type"]
            yield self._item_event(f"response.{kind}.done", content_index=0, text=part["text"], **_log_probs(kind))
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        item["status"] = "in_progress"
        self._output.append(item)
        self._has_open_item = True
        return item

    @property
    def _last(self) -> int:
        return len(self._output) - 1

    def _usage(self) -> dict[str, Any]:
        turns = self._turns
        prompt, completion, cached = (
            (0, 0, 0) if turns is None else (turns.prompt_tokens, turns.completion_tokens, turns.cached_tokens)
        )
        reasoning = sum(
            len(self._tokenizer.encode(part["text"], add_bos=False))
            for item in self._output
            if item["type"] == "reasoning"
            for part in item["content"]
        )
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": prompt + completion,
        }

    def _item_event(self, kind: str, **content: Any) -> _NamedEvent:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=self._last, **content)

    def _event(self, kind: str, **content: Any) -> _NamedEvent:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        # a copy: items grow after the event
        return kind, json.loads(json.dumps({"type": kind, "sequence_number": number, **content}))


#: Fields of the request that the response repeats.
_ECHOED = {
    *("model", "temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "truncation"),
    *("background", "store", "metadata"),
}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _log_probs(part_kind: str) -> dict[str, Any]:
    """The field that clients expect in events of an answer's text."""
    return {"logprobs": []} if part_kind == "output_text" else {}


def _part(kind: str) -> dict[str, Any]:
    return {"type": kind, "text": ""} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


class ResponsesApi:
    """The routes. Responses are stored for the key that asked for them. documents: what `file_search` looks in."""

    def __init__(self, served: Served, store: ResponseStore, documents: VectorStores) -> None:
        self._served = served
        self._store = store
        self._documents = documents

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/responses")
        router.add_api_route("", self.create, methods=["POST"], response_model=None)
        router.add_api_route("/{identity}", self.retrieve, methods=["GET"])
        router.add_api_route("/{identity}", self.delete, methods=["DELETE"])
        router.add_api_route("/{identity}/input_items", self.inputs, methods=["GET"])
        return router

    async def create(self, request: Request) -> Response:
        body = await read_body(ResponsesRequest, request)
        caller = caller_of(request)
        owner = caller.client.id
        served = await self._served.model_for(body.model, caller)
        previous = [] if body.previous_response_id is None else (await self._find(body.previous_response_id, owner)).messages
        tokenizer = served.engine.tokenizer
        if body.is_probe:
            reply = ResponseReply(body, tokenizer, None)
            events = reply.start() + reply.complete_probe()
            return EventStream([events]) if body.stream else JSONResponse(reply.body())

        async def store() -> None:
            # before the last event is sent: its reader may ask for the response at once
            if reply.is_over and body.store:
                await self._store.keep(reply.identity, _stored(reply, body, owner, previous))

        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            chat = _chat(body, previous, caller)
            question = chat.last_question
            if (tool := body.file_search) is not None:
                sources = await sources_for(question, tool.wanted(), self._documents, caller.client, "input")
                chat = replace(chat, sources=sources)
            turns = await asyncio.to_thread(served.begin, chat)
            reply = ResponseReply(body, tokenizer, turns, question)
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream, after_step=store)

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
        """Raises ApiError (404) for a response that is unknown, or of another owner."""
        response = await self._store.find(identity)
        if response is None or response.owner != owner:
            raise ApiError(f"there is no response '{identity}'", status=404, code="response_not_found")
        return response


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
