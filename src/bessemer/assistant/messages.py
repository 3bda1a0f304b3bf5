"""Messages in parts with their origin, and the events of a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any, Literal, Self

from bessemer.assistant.tools import ToolResult
from bessemer.tokenization.chat import checked_messages

Origin = Literal["system", "user", "assistant", "document", "tool", "memory"]
Role = Literal["system", "user", "assistant", "tool"]

#: Origins of text that may hold instructions of neither the user nor the system prompt (prompt injection).
_UNTRUSTED: tuple[Origin, ...] = ("document", "tool", "memory")


@dataclass(frozen=True)
class MessagePart:
    """A part of a message. source: id of a document, or name of a tool. is_image: whether it is the place of a picture, which
    has no text; the pictures themselves are beside the conversation, in the order of their places."""

    text: str
    origin: Origin
    source: str = ""
    is_image: bool = False

    @property
    def is_tainted(self) -> bool:
        """Whether it comes from a document, a tool or memory."""
        return self.origin in _UNTRUSTED


@dataclass(frozen=True)
class ToolCall:
    """A tool call. id: nine letters and digits, which every chat template accepts."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    thinking, calls: of the assistant. call_id, name: of a tool's result: its call, and the tool. is_derived: whether the
    assistant had read something tainted before it wrote the message.
    """

    role: Role
    parts: tuple[MessagePart, ...] = ()
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""
    is_derived: bool = False

    @classmethod
    def system(cls, text: str) -> Self:
        return cls("system", (MessagePart(text, "system"),))

    @classmethod
    def user(cls, text: str) -> Self:
        return cls("user", (MessagePart(text, "user"),))

    @classmethod
    def assistant(cls, text: str) -> Self:
        return cls("assistant", (MessagePart(text, "assistant"),))

    @classmethod
    def tool(cls, call_id: str, name: str, text: str) -> Self:
        return cls("tool", (MessagePart(text, "tool", name),), call_id=call_id, name=name)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def is_tainted(self) -> bool:
        """Whether text of unknown authors is in it, or may have influenced it."""
        return self.is_derived or any(part.is_tainted for part in self.parts)

    def with_part(self, part: MessagePart) -> Self:
        return replace(self, parts=(*self.parts, part))

    def as_template_input(self) -> dict[str, Any]:
        """The message in the form of chat completions, for a chat template or an API."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if any(part.is_image for part in self.parts):
            message["content"] = [
                {"type": "image"} if part.is_image else {"type": "text", "text": part.text} for part in self.parts
            ]
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.calls
            ]
        if self.call_id:
            message["tool_call_id"] = self.call_id
        if self.name:
            message["name"] = self.name
        return message


def as_messages(given: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in the form of chat completions: `role`, `content`, `reasoning_content`, `tool_calls`, `tool_call_id`.

    Each becomes one part, whose origin is the role, or of a content of parts as many. A text `remembered` stands before them,
    with the origin `memory`. Raises RequestError for a malformed one.
    """
    return [_as_message(message) for message in checked_messages(given)]


#: Number of letters and digits of a call's id that every chat template takes.
_ID_LENGTH = 9


def with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with an id for each call that has none, of the form that turns give out; results get those of the calls
    before them, in order."""
    numbers = count()
    waiting: list[ToolCall] = []
    placed: list[Message] = []
    for message in messages:
        if message.calls:
            calls = tuple(call if call.id else replace(call, id=f"call{next(numbers):05d}") for call in message.calls)
            waiting, message = list(calls), replace(message, calls=calls)
        elif message.role == "tool":
            call = next((call for call in waiting if call.id == message.call_id), waiting[0] if waiting else None)
            if call is not None:
                waiting.remove(call)
                message = replace(message, call_id=message.call_id or call.id, name=message.name or call.name)
        placed.append(message)
    return placed


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of calls as turns give them out, in place of others: Mistral's templates take no other length."""
    shorter: dict[str, str] = {}
    for message in messages:
        for id in (*(call.id for call in message.calls), message.call_id):
            if id and not (len(id) == _ID_LENGTH and id.isalnum()):
                shorter.setdefault(id, f"call{len(shorter):05d}")
    return [
        replace(
            message,
            calls=tuple(replace(call, id=shorter.get(call.id, call.id)) for call in message.calls),
            call_id=shorter.get(message.call_id, message.call_id),
        )
        for message in messages
    ]


def with_one_call_each(messages: Sequence[Message]) -> list[tuple[int, Message]]:
    """The messages, each behind its number, for a model that calls one tool in a turn: a message with several calls becomes one
    for each, followed by the result of its call."""
    placed: list[tuple[int, Message]] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        results = takewhile(lambda one: one[1].role == "tool", enumerate(messages[place + 1 :], start=place + 1))
        waiting = list(results) if len(message.calls) > 1 else []
        place += 1 + len(waiting)
        if len(message.calls) < 2:
            placed.append((place - 1, message))
            continue
        number = place - 1 - len(waiting)
        for nth, call in enumerate(message.calls):
            own = replace(message, calls=(call,)) if nth == 0 else Message("assistant", calls=(call,))
            placed.append((number, own))
            result = next((one for one in waiting if one[1].call_id == call.id), None)
            if result is not None:
                waiting.remove(result)
                placed.append(result)
        placed += waiting
    return placed


def with_system_first(messages: Sequence[Message]) -> list[Message]:
    """The messages for a chat template that allows a system message at the beginning only: leading ones are joined, later ones
    are moved into user messages as parts of origin `system`."""
    placed: list[Message] = []
    for message in messages:
        before = placed[-1] if placed else None
        is_moved = message.role == "system" and before is not None
        # an adjacent user message is joined with a moved one: many templates refuse two in a row
        is_adjacent = message.role == "user" and before is not None and before.role == "user"
        if before is not None and (
            (is_moved and before.role in ("system", "user"))
            or (is_adjacent and any(part.origin == "system" for part in before.parts))
        ):
            placed[-1] = replace(before, parts=(*before.parts, MessagePart("\n\n", "system"), *message.parts))
        else:
            placed.append(replace(message, role="user") if is_moved else message)
    return placed


def _as_message(given: Mapping[str, Any]) -> Message:
    role: Role = given["role"]
    name = str(given.get("name", ""))
    content = given.get("content", "")
    if isinstance(content, list):
        parts = tuple(MessagePart(part.get("text", ""), role, is_image=part["type"] == "image") for part in content)
    else:
        parts = (MessagePart(content, role, name if role == "tool" else ""),) if content else ()
    if remembered := given.get("remembered"):
        parts = (MessagePart(str(remembered), "memory"), *parts)
    calls = [_as_call(call) for call in given.get("tool_calls", ())]
    return Message(
        role,
        parts,
        str(given.get("reasoning_content", "")),
        tuple(calls),
        str(given.get("tool_call_id", "")),
        name,
    )


def _as_call(call: Mapping[str, Any]) -> ToolCall:
    """A call whose form is checked. Arguments that are no JSON object are kept as `raw`."""
    function = call.get("function", call)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = {"raw": arguments}
    return ToolCall(str(call.get("id", "")), function["name"], arguments if isinstance(arguments, dict) else {"raw": arguments})


@dataclass(frozen=True)
class ThinkingDelta:
    """More thinking."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Called:
    """The assistant calls a tool. A client-side call has passed the hooks, with these arguments."""

    call: ToolCall


@dataclass(frozen=True)
class BadCall:
    """A call that cannot be read. text: as the model wrote it, with its tags."""

    text: str
    reason: str


@dataclass(frozen=True)
class RolledBack:
    """A hook withdraws what was given out of this message, for a reason."""

    reason: str


@dataclass(frozen=True)
class MessageEnd:
    """The assistant's message as a whole."""

    message: Message


@dataclass(frozen=True)
class Returned:
    """A tool's result, or why it was not called. call: None after a `BadCall`. No `Called` comes before it for a client-side
    call that hooks denied."""

    call: ToolCall | None
    result: ToolResult


#: `answer`: a complete answer. `length`: max_tokens or the context is used up. `rounds`: max_rounds is reached. `tool_calls`:
#: the client has calls to run. `refused`: hooks refused every attempt.
EndReason = Literal["answer", "length", "rounds", "tool_calls", "refused"]


@dataclass(frozen=True)
class TurnEnd:
    """The turn is over.

    prompt_tokens: of its first round. completion_tokens: sampled in all rounds, also for messages that were sent back. Both are
    0 for an API. stopped_by: the stop string that ended the last message, where one did.
    """

    reason: EndReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped_by: str = ""


#: Events of a message while it is generated.
DraftEvent = ThinkingDelta | TextDelta | Called | BadCall
Event = DraftEvent | RolledBack | MessageEnd | Returned | TurnEnd
