"""Messages in parts that carry their origin, their form for a chat template, and the events of a turn in order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from bessemer.assistant.tools import ToolResult
from bessemer.tokenization.chat import checked_messages

Origin = Literal["system", "user", "assistant", "document", "tool", "memory"]
Role = Literal["system", "user", "assistant", "tool"]

#: Written by neither the user nor the makers of the system prompt: it may hold the instructions of others.
_UNTRUSTED: tuple[Origin, ...] = ("document", "tool", "memory")


@dataclass(frozen=True)
class Part:
    """A part of a message. source: a document's id, a tool's name."""

    text: str
    origin: Origin
    source: str = ""

    @property
    def is_tainted(self) -> bool:
        """Whether neither the system, the user nor the assistant wrote it."""
        return self.origin in _UNTRUSTED


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. id: nine letters and digits, which every chat template takes."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    thinking, calls: of the assistant's. call_id, name: of a tool's result: the call that it answers, and the tool. is_derived:
    the assistant wrote it, be it a call alone, after it had read something tainted.
    """

    role: Role
    parts: tuple[Part, ...] = ()
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""
    is_derived: bool = False

    @classmethod
    def system(cls, text: str) -> Self:
        """A system prompt."""
        return cls("system", (Part(text, "system"),))

    @classmethod
    def user(cls, text: str) -> Self:
        """What the user says."""
        return cls("user", (Part(text, "user"),))

    @classmethod
    def assistant(cls, text: str) -> Self:
        """What the assistant said."""
        return cls("assistant", (Part(text, "assistant"),))

    @classmethod
    def tool(cls, call_id: str, name: str, text: str) -> Self:
        """The result of a call."""
        return cls("tool", (Part(text, "tool", name),), call_id=call_id, name=name)

    @property
    def text(self) -> str:
        """The texts of all parts, joined."""
        return "".join(part.text for part in self.parts)

    @property
    def is_tainted(self) -> bool:
        """Whether somebody else than the user and the system may have had a say in it."""
        return self.is_derived or any(part.is_tainted for part in self.parts)

    def with_part(self, part: Part) -> Self:
        """The message with one more part at its end."""
        return replace(self, parts=(*self.parts, part))

    def as_template_input(self) -> dict[str, Any]:
        """The message for a chat template, or for an API of chat completions."""
        given: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.thinking:
            given["reasoning_content"] = self.thinking
        if self.calls:
            given["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.calls
            ]
        if self.call_id:
            given["tool_call_id"] = self.call_id
        if self.name:
            given["name"] = self.name
        return given


def as_messages(given: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in the form of chat completions: `role`, `content`, `reasoning_content`, `tool_calls`, `tool_call_id`.

    Each is one part, of the origin that its role says. Raises RequestError for one that is malformed.
    """
    return [_as_message(message) for message in checked_messages(given)]


def with_system_first(messages: Sequence[Message]) -> list[Message]:
    """The messages for a chat template that takes a system message at the beginning alone: the first ones are joined, and later
    ones stand in what the user says, their origin kept."""
    placed: list[Message] = []
    for message in messages:
        before = placed[-1] if placed else None
        is_moved = message.role == "system" and before is not None
        # what the user says next to it is one message with it: many templates refuse two in a row
        is_beside = message.role == "user" and before is not None and before.role == "user"
        if before is not None and (
            (is_moved and before.role in ("system", "user"))
            or (is_beside and any(part.origin == "system" for part in before.parts))
        ):
            placed[-1] = replace(before, parts=(*before.parts, Part("\n\n", "system"), *message.parts))
        else:
            placed.append(replace(message, role="user") if is_moved else message)
    return placed


def _as_message(given: Mapping[str, Any]) -> Message:
    role: Role = given["role"]
    name = str(given.get("name", ""))
    text = given.get("content", "")
    calls = [_as_call(call) for call in given.get("tool_calls", ())]
    return Message(
        role,
        (Part(text, role, name if role == "tool" else ""),) if text else (),
        str(given.get("reasoning_content", "")),
        tuple(calls),
        str(given.get("tool_call_id", "")),
        name,
    )


def _as_call(call: Mapping[str, Any]) -> ToolCall:
    """A call whose form is checked. Arguments that are a text of something else than an object are kept as `raw`."""
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
    """More of what the assistant thinks."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of what the assistant says."""

    text: str


@dataclass(frozen=True)
class Called:
    """The assistant calls a tool. Of one that the caller of the turn runs: the hooks allow it, with these arguments."""

    call: ToolCall


@dataclass(frozen=True)
class BadCall:
    """What should be a call and cannot be read as one. text: as it was written, with its tags."""

    text: str
    reason: str


@dataclass(frozen=True)
class RolledBack:
    """What was given out of this message is withdrawn. reason: what the hook says that sent it back."""

    reason: str


@dataclass(frozen=True)
class MessageEnd:
    """The assistant's message as a whole."""

    message: Message


@dataclass(frozen=True)
class Returned:
    """What a tool returned, or why it was not called. call: None for the answer to a `BadCall`. A call that hooks did not let
    the caller run has no `Called` before."""

    call: ToolCall | None
    result: ToolResult


#: `answer`: the assistant has answered. `length`: max_tokens or the context is used up. `rounds`: it called tools as often as
#: it may. `tool_calls`: it waits for tools that the caller runs. `refused`: a hook let no answer pass.
EndReason = Literal["answer", "length", "rounds", "tool_calls", "refused"]


@dataclass(frozen=True)
class TurnEnd:
    """The turn is over. prompt_tokens: read at its first round; completion_tokens: sampled in all its rounds, those of answers
    that were sent back among them. Both are 0 where the model is not of this machine. stopped_by: the stop string at which the
    last message ended, where one did."""

    reason: EndReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped_by: str = ""


#: What becomes of a message as it is generated.
DraftEvent = ThinkingDelta | TextDelta | Called | BadCall
Event = DraftEvent | RolledBack | MessageEnd | Returned | TurnEnd
