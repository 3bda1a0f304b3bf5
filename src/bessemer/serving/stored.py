"""Responses that are kept for those who asked for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bessemer.serving import limits

_MIB = 2**20
#: Bytes that a value takes besides its text.
_VALUE_BYTES = 64


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


@dataclass
class _Shelf:
    """What is stored of one owner, the oldest first, and how many bytes it has."""

    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    size: int = 0


class MemoryStore:
    """The last responses, in memory, limited in number and in MiB. Beyond a limit the oldest response of the owner with the
    most bytes is dropped, so that one owner's flood drops no other's."""

    def __init__(self, most: int = limits.STORED.most, most_mib: float = limits.STORED_BYTES.most) -> None:
        self._most = most
        self._most_bytes = round(most_mib * _MIB)
        self._stored: dict[str, StoredResponse] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._size = 0

    async def keep(self, identity: str, response: StoredResponse) -> None:
        await self.drop(identity)
        size = size_of([response.body, response.messages, response.inputs])
        shelf = self._shelves.setdefault(response.owner, _Shelf())
        self._stored[identity] = response
        shelf.sizes[identity] = size
        shelf.size += size
        self._size += size
        while len(self._stored) > self._most or self._size > self._most_bytes:
            largest = max(self._shelves.values(), key=lambda one: one.size)
            await self.drop(next(iter(largest.sizes)))

    async def find(self, identity: str) -> StoredResponse | None:
        return self._stored.get(identity)

    async def drop(self, identity: str) -> None:
        if (response := self._stored.pop(identity, None)) is None:
            return
        shelf = self._shelves[response.owner]
        size = shelf.sizes.pop(identity)
        shelf.size -= size
        self._size -= size
        if not shelf.sizes:
            del self._shelves[response.owner]


def size_of(value: Any) -> int:
    """About how many bytes a value of JSON takes in memory."""
    size, left = 0, [value]
    while left:
        one = left.pop()
        size += _VALUE_BYTES
        if isinstance(one, str):
            size += len(one) if one.isascii() else 4 * len(one)
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, Sequence):
            left += one
    return size
