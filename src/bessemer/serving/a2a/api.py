"""`/a2a`: a message becomes a task, which the model answers at once, whole or in a stream; the card says so.

A message without a context begins one; one that names a context goes on from the last task in it. Tasks are kept for the key
that asked, like responses.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib.metadata import version as package_version
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from bessemer.assistant.messages import TurnEnd
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.a2a.protocol import (
    CARD_PATH,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHODS,
    NO_METHOD,
    NO_TASK,
    NOT_CANCELABLE,
    PARSE_ERROR,
    PATH,
    UNSUPPORTED,
    Call,
    Method,
    RpcError,
    SendParams,
    TaskParams,
    Version,
    card,
    status_event,
    task_body,
    task_event,
    text_event,
)
from bessemer.serving.responses.store import ResponseStore, StoredResponse
from bessemer.serving.runtime.bodies import ApiError, read_json
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import Reply, respond, server_sent_event
from bessemer.serving.runtime.worker import ChoiceEvents, text_of

Params = TypeVar("Params", bound=BaseModel)


class TaskReply(Reply):
    """A task as the answer to a call, whole or event by event. task: it as it is kept, which this changes."""

    def __init__(self, call: Call, method: Method, task: dict[str, Any]) -> None:
        self.task = task
        self._call = call
        self._version: Version = method.version

    @property
    def is_over(self) -> bool:
        """Whether the task has come to its end."""
        return self.task["state"] != "working"

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        self._read(list(step))
        body = task_body(self.task, self._version)
        return _answer(self._call, body if self._version == "0.3" else {"task": body})

    def start(self) -> str:
        return self._event(task_event(self.task, self._version))

    def events(self, step: Iterable[ChoiceEvents]) -> str:
        before = self.task["answer"]
        text = self._read(list(step))
        parts = self._event(text_event(self.task, text, self._version, is_first=not before)) if text else ""
        return parts + (self._event(status_event(self.task, self._version)) if self.is_over else "")

    def failed(self, error: ApiError) -> str:
        self._finish("failed", str(error))
        return self._event(status_event(self.task, self._version))

    def _finish(self, state: str, reason: str = "") -> None:
        self.task |= {"state": state, "when": _now(), "reason": reason}

    def _read(self, step: Sequence[ChoiceEvents]) -> str:
        """Add what came to the task; its text. Raises ApiError where a hook took the answer back."""
        text = text_of(step)
        for event in (event for _, events, *_ in step for event in events):
            if isinstance(event, TurnEnd):
                self._finish("completed", "the answer was cut at the end of the context" if event.reason == "length" else "")
        self.task["answer"] += text
        return text

    def _event(self, result: dict[str, Any]) -> str:
        return server_sent_event(_answer(self._call, result))


class A2AApi:
    """The card and the one route of all methods. needs_key: whether the server asks for a key."""

    def __init__(self, served: Served, store: ResponseStore, *, needs_key: bool) -> None:
        self._served = served
        self._store = store
        self._needs_key = needs_key

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route(CARD_PATH, self.card, methods=["GET"])
        router.add_api_route(PATH, self.call, methods=["POST"], response_model=None)
        return router

    async def card(self, request: Request) -> dict[str, Any]:
        # the gate has checked the host
        url = f"{request.url.scheme}://{request.headers['host']}"
        tools = [] if self._served.server_tools is None else [tool.name for tool in self._served.server_tools("")]
        return card(self._served.model_name, url, package_version("bessemer"), tools, needs_key=self._needs_key)

    async def call(self, request: Request) -> Response:
        """A call of JSON-RPC: errors of it have the status 200, as the protocol wants."""
        call = Call(jsonrpc="2.0", method="")
        try:
            try:
                values = read_json(await request.body())
            except ApiError as error:
                raise RpcError(PARSE_ERROR, str(error)) from None
            # so that an error names the call it answers
            if isinstance(values, dict) and isinstance(identity := values.get("id"), str | int):
                call = call.model_copy(update={"id": identity})
            call = _parsed(Call, values, INVALID_REQUEST)
            if (method := METHODS.get(call.method)) is None:
                raise RpcError(NO_METHOD, f"there is no method '{call.method}'; this server has {', '.join(METHODS)}")
            if method.does in ("send", "stream"):
                return await self._send(request, call, method)
            return JSONResponse(_answer(call, await self._look(caller_of(request), call, method)))
        except RpcError as error:
            return JSONResponse({"jsonrpc": "2.0", "id": call.id, "error": error.body()})
        except ApiError as error:
            return JSONResponse({"jsonrpc": "2.0", "id": call.id, "error": RpcError.of(error).body()}, headers=error.headers)

    async def _send(self, request: Request, call: Call, method: Method) -> Response:
        message = _parsed(SendParams, call.params, INVALID_PARAMS).message
        caller = caller_of(request)
        owner = caller.client.id
        if message.task_id:
            await self._find(message.task_id, owner)
            raise RpcError(UNSUPPORTED, "a task of this server is over with its answer; name its context to go on from it")
        context = message.context_id or f"ctx_{uuid.uuid4().hex}"
        # a client names its context as it likes, also as another one has named its own
        kept_as = f"{owner}/{context}"
        last = await self._store.find(kept_as)
        previous = [] if last is None else last.messages
        messages = [*previous, {"role": "user", "content": message.text}]
        served = await self._served.model_for(self._served.model_name, caller)
        task = {
            "id": f"task_{uuid.uuid4().hex}",
            "context": context,
            "state": "working",
            "when": _now(),
            "answer": "",
            "question": message.text,
            "question_id": message.message_id,
            "reason": "",
        }
        reply = TaskReply(call, method, task)

        async def keep() -> None:
            if reply.is_over:
                answered = [*messages, {"role": "assistant", "content": task["answer"]}]
                await self._store.keep(task["id"], StoredResponse(owner, dict(task), [], []))
                await self._store.keep(kept_as, StoredResponse(owner, {}, answered, []))

        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            chat = Chat(
                caller, served.model_name, messages, lambda most: SamplingParams(max_tokens=most), lambda reason: "message"
            )
            turns = await served.start(lambda: chat)
            is_streamed = method.does == "stream"
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=is_streamed, after_step=keep)

    async def _look(self, caller: Caller, call: Call, method: Method) -> dict[str, Any]:
        wanted = _parsed(TaskParams, call.params, INVALID_PARAMS)
        task = await self._find(wanted.id, caller.client.id)
        if method.does == "cancel":
            raise RpcError(NOT_CANCELABLE, f"the task '{wanted.id}' is over")
        return task_body(task, method.version, wanted.history)

    async def _find(self, identity: str, owner: str) -> dict[str, Any]:
        """A task as it is kept. Raises RpcError for one that is unknown, under way, or another owner's."""
        found = await self._store.find(identity)
        if found is None or found.owner != owner or not found.body:
            raise RpcError(NO_TASK, f"there is no task '{identity}'")
        return found.body


def _answer(call: Call, result: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": call.id, "result": result}


def _parsed(kind: type[Params], values: Any, code: int) -> Params:
    """Raises RpcError, which names the first thing that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise RpcError(code, f"{where}: {first['msg']}" if where else first["msg"]) from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
