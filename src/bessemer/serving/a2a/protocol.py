"""Messages and tasks of the Agent2Agent protocol, versions 0.3 and 1.0 of its JSON-RPC form, and the agent's card.

The two differ in the names of methods, roles and states, and in what says of which kind a value is: a field `kind`, or the name
of the field that holds it. Which is meant, the method's name says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from bessemer.serving.config import MESSAGES, NAME
from bessemer.serving.runtime.bodies import ApiError

Version = Literal["0.3", "1.0"]
State = Literal["working", "completed", "failed", "canceled"]
#: Where the card is looked for (RFC 8615), and where messages go.
CARD_PATH, PATH = "/.well-known/agent-card.json", "/a2a"
#: Codes of JSON-RPC, and those that A2A adds.
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
NO_TASK, NOT_CANCELABLE, UNSUPPORTED, NO_CONTENT_TYPE = -32001, -32002, -32004, -32005


class Method(NamedTuple):
    """What a method does, and the version that calls it so."""

    does: Literal["send", "stream", "get", "cancel"]
    version: Version


METHODS = {
    "message/send": Method("send", "0.3"),
    "message/stream": Method("stream", "0.3"),
    "tasks/get": Method("get", "0.3"),
    "tasks/cancel": Method("cancel", "0.3"),
    "SendMessage": Method("send", "1.0"),
    "SendStreamingMessage": Method("stream", "1.0"),
    "GetTask": Method("get", "1.0"),
    "CancelTask": Method("cancel", "1.0"),
}


class RpcError(Exception):
    """An answer of JSON-RPC that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: ApiError) -> RpcError:
        """An error of this server: of what was asked for, or of its own."""
        return cls(INVALID_PARAMS if error.status < 429 else INTERNAL_ERROR, str(error))

    def body(self) -> dict[str, Any]:
        return {"code": self.code, "message": str(self)}


class _Lenient(BaseModel):
    """Fields that are not read here are passed over: the protocol has extensions."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Call(_Lenient):
    """A request of JSON-RPC."""

    jsonrpc: Literal["2.0"]
    id: str | int | None = None
    method: str = Field(max_length=NAME.most)
    params: dict[str, Any] = Field(default_factory=dict)


class SentPart(_Lenient):
    """A part of a message: a text, or data."""

    text: str | None = None
    data: Any = None

    def in_words(self) -> str:
        """The text that the model reads. Raises RpcError for a part of another kind."""
        if self.text is not None:
            return self.text
        if self.data is not None:
            return json.dumps(self.data, ensure_ascii=False)
        raise RpcError(NO_CONTENT_TYPE, "parts are texts or data; files are not taken")


class SentMessage(_Lenient):
    """A message of the user's."""

    message_id: str = Field(alias="messageId", min_length=1, max_length=NAME.most)
    role: Literal["user", "ROLE_USER"]
    parts: list[SentPart] = Field(min_length=1, max_length=MESSAGES.most)
    context_id: str | None = Field(None, alias="contextId", max_length=NAME.most)
    task_id: str | None = Field(None, alias="taskId", max_length=NAME.most)

    @property
    def text(self) -> str:
        return "\n".join(part.in_words() for part in self.parts)


class SendParams(_Lenient):
    """Parameters of sending a message."""

    message: SentMessage


class TaskParams(_Lenient):
    """Parameters of looking at, or ending, a task. history: messages to give with it, at most; None: all."""

    id: str = Field(min_length=1, max_length=NAME.most)
    history: int | None = Field(None, alias="historyLength", ge=0)


def part(text: str, version: Version) -> dict[str, Any]:
    """A part that is a text."""
    return {"kind": "text", "text": text} if version == "0.3" else {"text": text}


def message(
    role: Literal["user", "agent"], identity: str, text: str, task: Mapping[str, Any], version: Version
) -> dict[str, Any]:
    """A message of a task."""
    of = {"messageId": identity, "taskId": task["id"], "contextId": task["context"], "parts": [part(text, version)]}
    return of | ({"kind": "message", "role": role} if version == "0.3" else {"role": f"ROLE_{role.upper()}"})


def status(state: State, when: str, version: Version) -> dict[str, Any]:
    """A task's state, and since when."""
    return {"state": state if version == "0.3" else f"TASK_STATE_{state.upper()}", "timestamp": when}


def task_body(task: Mapping[str, Any], version: Version, history: int | None = None) -> dict[str, Any]:
    """A task as it is kept (`id`, `context`, `state`, `when`, `reason`, `question`, `question_id`, `answer`) in a version's
    words. history: messages to give with it, at most."""
    body: dict[str, Any] = {
        "id": task["id"],
        "contextId": task["context"],
        "status": status(task["state"], task["when"], version),
    }
    if task["answer"]:
        body["artifacts"] = [artifact(task, task["answer"], version)]
    if task["reason"]:
        body["status"]["message"] = message("agent", f"{task['id']}-reason", task["reason"], task, version)
    if history != 0:
        body["history"] = [message("user", task["question_id"], task["question"], task, version)]
    return body | ({"kind": "task"} if version == "0.3" else {})


def artifact(task: Mapping[str, Any], text: str, version: Version) -> dict[str, Any]:
    """A task's answer, or more of it."""
    return {"artifactId": f"{task['id']}-answer", "name": "answer", "parts": [part(text, version)]}


def task_event(task: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """The first event of a stream."""
    body = task_body(task, version)
    return body if version == "0.3" else {"task": body}


def text_event(task: Mapping[str, Any], text: str, version: Version, *, is_first: bool) -> dict[str, Any]:
    """More of the answer."""
    event = {
        "taskId": task["id"],
        "contextId": task["context"],
        "artifact": artifact(task, text, version),
        "append": not is_first,
        "lastChunk": False,
    }
    return {"kind": "artifact-update", **event} if version == "0.3" else {"artifactUpdate": event}


def status_event(task: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """What a task has come to: the last event of a stream."""
    whole = task_body(task, version)
    event = {"taskId": task["id"], "contextId": task["context"], "status": whole["status"]}
    return {"kind": "status-update", "final": True, **event} if version == "0.3" else {"statusUpdate": event}


def card(name: str, url: str, version: str, tools: Sequence[str], *, needs_key: bool) -> dict[str, Any]:
    """The agent's card, which both versions read. url: of the server. tools: that it calls itself."""
    address = f"{url}{PATH}"
    does = "Answers questions and continues conversations in plain text."
    skills = [{"id": "chat", "name": "Conversation", "description": does, "tags": ["chat"]}]
    skills += [
        {"id": tool, "name": tool, "description": f"Uses the tool {tool} where the answer needs it.", "tags": ["tool"]}
        for tool in tools
    ]
    described: dict[str, Any] = {
        "protocolVersion": "0.3.0",
        "name": name,
        "description": f"{name}, served by Bessemer. {does}",
        "url": address,
        "preferredTransport": "JSONRPC",
        "supportedInterfaces": [
            {"url": address, "protocolBinding": "JSONRPC", "protocolVersion": version} for version in ("1.0", "0.3")
        ],
        "version": version,
        "capabilities": {"streaming": True, "pushNotifications": False},
        "defaultInputModes": ["text/plain", "application/json"],
        "defaultOutputModes": ["text/plain"],
        "skills": skills,
    }
    if needs_key:
        # the scheme of OpenAPI in 0.3, and the same by the name of its kind in 1.0
        described["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "httpAuthSecurityScheme": {"scheme": "bearer"}}
        }
        described["security"] = [{"bearer": []}]
        described["securityRequirements"] = [{"schemes": {"bearer": {"list": []}}}]
    return described
