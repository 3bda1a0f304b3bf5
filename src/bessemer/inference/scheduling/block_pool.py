"""Block pool: reference counts of KV blocks, the prefix cache by content hash, and the order of eviction.

A block holds the keys and values of `block_size` neighbouring tokens. Its number is its place in the tensors of
`execution/kv_cache.py`; here are only numbers. A full block may be sealed under the hash of all the text up to its end:
another sequence with the same prefix then shares it instead of computing it again. A sealed block without references keeps
its content until the memory is needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import NamedTuple


def root_hash(salt: str | None, epoch: int = 0) -> bytes:
    """The first hash of a chain: equal only for the same adapter (`salt`) and the same weights (`epoch`)."""
    # repr keeps None apart from "None", and the comma keeps the two parts apart
    return hashlib.blake2b(f"{epoch},{salt!r}".encode(), digest_size=32).digest()


def chain_hash(parent: bytes, tokens: list[int]) -> bytes:
    """The hash of a full block: of its tokens and, through `parent`, of every block before it.

    Two texts with one hash would read each other's keys without an error, so the hash must not collide: 256 bits of blake2b
    do not collide by accident, and no prompt is known to collide on purpose. Python's own `hash` of a tuple has 64 bits that
    are easily forged. The text itself as key would be compared in full, at the price of the whole prefix for each block.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    """The blocks of one group of layers: reference counts, sealed content, and the order of eviction.

    A block is blank, held by one or more sequences, or idle: sealed and without references. Blank blocks are allocated
    first, then the idle one that was released longest ago. `hits` and `evictions` count blocks since the start.
    """

    def __init__(self, total: int, block_size: int) -> None:
        assert total > 0 and block_size > 0, "a pool has blocks, and a block has positions"
        self.total = total
        self.block_size = block_size
        self.references = [0] * total
        self.hits = 0
        self.evictions = 0
        self._keys: list[bytes | None] = [None] * total
        self._sealed: dict[bytes, int] = {}
        self._blank = list(range(total - 1, -1, -1))
        # not a dict: taking the first of a dict walks over all that were deleted before it
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be allocated: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Idle blocks: free, and still findable."""
        return len(self._idle)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sealed

    def find(self, key: bytes) -> int | None:
        """The block sealed under `key`. Its reference count stays."""
        return self._sealed.get(key)

    def share_found(self, key: bytes) -> int:
        """Add a reference to the block sealed under `key`, which is there: a hit of the prefix cache."""
        block = self._sealed[key]
        self.share(block)
        self.hits += 1
        return block

    def idle(self, keys: list[bytes]) -> int:
        """How many of the blocks sealed under `keys`, which are there, have no reference: sharing them takes free blocks."""
        return sum(self.references[self._sealed[key]] == 0 for key in keys)

    def is_sealed(self, block: int) -> bool:
        """Whether the block can be found by its content, and so must not be written."""
        return self._keys[block] is not None

    def allocate(self) -> int:
        """A block without content and with one reference. The caller has checked that one is `free`."""
        if self._blank:
            block = self._blank.pop()
        else:
            assert self._idle, "no block is free"
            block, _ = self._idle.popitem(last=False)
            self.unseal(block)
            self.evictions += 1
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that a sequence holds, or to an idle one."""
        if self.references[block] == 0:
            del self._idle[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """Remove a reference. The last one leaves the block idle if it is sealed, else blank.

        A sequence releases its last block first: the end of a text is evicted before its beginning, without which the end
        could not be found.
        """
        assert self.references[block] > 0, "a block was released twice"
        self.references[block] -= 1
        if self.references[block] == 0:
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def seal(self, block: int, key: bytes) -> None:
        """Put a full block into the prefix cache. Where another block holds the same text already, that one stays there."""
        assert self.references[block] > 0, "only a block that is held has content to seal"
        if key not in self._sealed and self._keys[block] is None:
            self._sealed[key] = block
            self._keys[block] = key

    def unseal(self, block: int) -> None:
        """Take a held block out of the prefix cache, so that it may be written."""
        key = self._keys[block]
        if key is not None:
            del self._sealed[key]
            self._keys[block] = None

    def own(self, block: int) -> int:
        """The block to write instead of a held one: itself with a single reference, else a fresh one (copy on write).

        The caller copies the content where the number differs, and has checked that a block is `free` then.
        """
        if self.references[block] == 1:
            self.unseal(block)
            return block
        fresh = self.allocate()
        self.release(block)
        return fresh

    def forget(self) -> None:
        """Drop the content of all idle blocks: the weights have changed."""
        for block in self._idle:
            self.unseal(block)
            self._blank.append(block)
        self._idle.clear()


class BlockGroup(NamedTuple):
    """Layers that share their block tables. window: keys that a query attends to, its own among them; None: all before it."""

    pool: BlockPool
    window: int | None = None
