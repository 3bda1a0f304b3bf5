"""Responses that are stored: a protocol for storage, and the latest ones in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bessemer.serving.config import STORED, STORED_BYTES
from bessemer.serving.runtime.pictures import ImageData

_MIB = 2**20
#: Bytes of a Python object besides its text.
_VALUE_BYTES = 64


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation.

    owner: the client's id. messages: in the form of chat completions, without instructions. inputs: items of the request.
    """

    owner: str
    body: dict[str, Any]
    messages: list[dict[str, Any]]
    inputs: list[dict[str, Any]]


class ResponseStore(Protocol):
    """Storage of responses; several servers may share one."""

    async def keep(self, identity: str, response: StoredResponse) -> None:
        """Store a response."""

    async def find(self, identity: str) -> StoredResponse | None:
        """A stored response; None for an unknown or dropped one."""

    async def drop(self, identity: str) -> None:
        """Delete a response."""


@dataclass
class _OwnerUsage:
    """Bytes of each stored response of one owner, the oldest first, and their sum."""

    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    size: int = 0


class MemoryStore:
    """The latest responses, in memory. Above a limit, the oldest response of the owner with the most bytes is dropped, so that
    one client cannot push out the others' responses."""

    def __init__(self, most: int = STORED.most, most_mib: float = STORED_BYTES.most) -> None:
        self._most = most
        self._most_bytes = round(most_mib * _MIB)
        self._stored: dict[str, StoredResponse] = {}
        self._by_owner: dict[str, _OwnerUsage] = {}
        self._size = 0

    async def keep(self, identity: str, response: StoredResponse) -> None:
        await self.drop(identity)
        size = size_of([response.body, response.messages, response.inputs])
        usage = self._by_owner.setdefault(response.owner, _OwnerUsage())
        self._stored[identity] = response
        usage.sizes[identity] = size
        usage.size += size
        self._size += size
        while len(self._stored) > self._most or self._size > self._most_bytes:
            largest = max(self._by_owner.values(), key=lambda usage: usage.size)
            await self.drop(next(iter(largest.sizes)))

    async def find(self, identity: str) -> StoredResponse | None:
        return self._stored.get(identity)

    async def drop(self, identity: str) -> None:
        if (response := self._stored.pop(identity, None)) is None:
            return
        usage = self._by_owner[response.owner]
        size = usage.sizes.pop(identity)
        usage.size -= size
        self._size -= size
        if not usage.sizes:
            del self._by_owner[response.owner]


def size_of(value: Any) -> int:
    """About how many bytes a value of JSON takes in memory."""
    size, left = 0, [value]
    while left:
        value = left.pop()
        size += _VALUE_BYTES
        if isinstance(value, str):
            size += len(value) if value.isascii() else 4 * len(value)
        elif isinstance(value, ImageData):
            size += len(value.data)
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, Sequence):
            left += value
    return size
