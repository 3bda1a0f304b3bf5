"""What happens in a turn, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bessemer.assistant.messages import Message, ToolCall
from bessemer.assistant.tools import ToolResult


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
