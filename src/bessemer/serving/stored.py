"""Responses that are kept for those who asked for them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

#: Responses that are kept; the oldest goes first.
KEPT = 1000


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation, in the form of chat completions and without instructions. owner: the client's id."""

    owner: str
    body: dict[str, Any]
    messages: list[dict[str, Any]]
    inputs: list[dict[str, Any]]


class ResponseStore(Protocol):
    """Where responses are kept; several servers may share one."""

    async def keep(self, identity: str, response: StoredResponse) -> None:
        """Keep a response."""

    async def find(self, identity: str) -> StoredResponse | None:
        """A response; None where there is none, or no longer."""

    async def drop(self, identity: str) -> None:
        """Forget a response."""


class MemoryStore:
    """The last responses, in memory."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    async def keep(self, identity: str, response: StoredResponse) -> None:
        self._stored[identity] = response
        while len(self._stored) > self._most:
            self._stored.popitem(last=False)

    async def find(self, identity: str) -> StoredResponse | None:
        return self._stored.get(identity)

    async def drop(self, identity: str) -> None:
        self._stored.pop(identity, None)
