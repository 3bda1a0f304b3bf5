"""Environments: worlds in which an assistant acts by what it says and by tools, and which say what that was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.events import EndReason
from bessemer.assistant.messages import Message
from bessemer.assistant.tools import Tool


@dataclass(frozen=True)
class Step:
    """What an environment makes of a turn. messages: what the assistant answers next, nothing where the episode is over.

    reward: of this turn; None where it cannot be given: the episode has no reward then.
    """

    reward: float | None
    messages: Sequence[Message] = ()


class Environment(Protocol):
    """A world of one episode at a time. Its tools may change its state."""

    @property
    def tools(self) -> Sequence[Tool]:
        """What the assistant may call, the same for a whole episode."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begin an episode: what the assistant reads first. task: a row of the data; seed: for all that is drawn."""

    def step(self, conversation: Conversation, end: EndReason) -> Step:
        """After a turn, whose messages are the conversation's last, and which ended by `end`."""
