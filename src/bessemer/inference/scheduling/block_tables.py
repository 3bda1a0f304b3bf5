"""Paged allocation (Kwon et al. 2023): the pool of KV blocks, its prefix cache, and the block tables of each sequence.

A block holds the keys and values of `block_size` neighbouring tokens. Its number is its place in the tensors of
`execution/kv_cache.py`; here are only numbers. A full block may be sealed under the hash of all the text up to its end:
another sequence with the same prefix then shares it instead of computing it again. A sealed block without references keeps
its content until the memory is needed.

A table names the block of every `block_size` positions. Blocks before `computed` may be shared with other sequences. The
block that is written next never is, nor is it in the prefix cache.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from bessemer.inference.scheduling.recurrent_states import SnapshotPool
from bessemer.inference.scheduling.sequence import TokenSequence, image_key


def root_hash(salt: str | None, epoch: int = 0) -> bytes:
    """The first hash of a chain: equal only for the same adapter (`salt`) and the same weights (`epoch`)."""
    # repr keeps None apart from "None", and the comma keeps the two parts apart
    return hashlib.blake2b(f"{epoch},{salt!r}".encode(), digest_size=32).digest()


def chain_hash(parent: bytes, tokens: list[int], images: bytes = b"") -> bytes:
    """The hash of a full block: of its tokens, its pictures (`image_key`) and, through `parent`, every block before it.

    Two texts with one hash would read each other's keys without an error. 256 bits of blake2b do not collide by accident, and
    no prompt is known to collide on purpose; Python's own `hash` of a tuple is easily forged.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes() + images, digest_size=32).digest()


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
        """Add a reference to the block that is sealed under `key`, counted as a hit of the prefix cache."""
        block = self._sealed[key]
        self.share(block)
        self.hits += 1
        return block

    def idle(self, keys: list[bytes]) -> int:
        """How many of the blocks sealed under `keys` have no reference: sharing these takes free blocks."""
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


class BlockTables:
    """Allocates blocks to sequences and takes them back.

    align: prefixes are shared in multiples of it. share_generated: False to cache only what was computed as part of a prompt,
    in whole multiples of `align`. share_prefixes: False for no prefix cache. snapshots: of the states of linear attention; a
    prefix is found as far as there is one.
    """

    def __init__(
        self,
        groups: Iterable[BlockGroup],
        *,
        block_size: int,
        align: int,
        share_generated: bool,
        share_prefixes: bool,
        snapshots: SnapshotPool | None = None,
    ) -> None:
        self.groups = list(groups)
        self.block_size = block_size
        assert all(pool.block_size == block_size for pool, _ in self.groups), "all groups have blocks of one size"
        self._align = align
        self._share_generated = share_generated
        self._share_prefixes = share_prefixes
        self._snapshots = snapshots
        self._windowed = [(index, pool, window) for index, (pool, window) in enumerate(self.groups) if window is not None]
        self.epoch = 0  # raised by `forget`

    # -- counts of blocks

    def blocks(self, tokens: int) -> int:
        """Blocks that hold the first `tokens` tokens."""
        return -(-tokens // self.block_size)

    def most(self, tokens: int, chunk: int, window: int | None) -> int:
        """The most blocks that a sequence of `tokens` computed tokens holds at once in a group, in chunks of `chunk`."""
        whole = self.blocks(tokens)
        if window is None:
            return whole
        # consecutive positions span the most blocks when the first of them is the last slot of a block
        positions = window - 1 + chunk
        return min(whole, (positions + self.block_size - 2) // self.block_size + 1)

    def passed(self, position: int, window: int | None) -> int:
        """Blocks wholly before the window of a query at `position`."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def outstanding(self, sequence: TokenSequence, chunk: int) -> list[int]:
        """Blocks of each group that a running sequence still needs for its known tokens, in chunks of `chunk`."""
        known = len(sequence.tokens)
        return [
            min(self.blocks(known) - len(table), self.most(known, chunk, window) - (len(table) - passed))
            for (_, window), table, passed in zip(self.groups, sequence.tables, sequence.passed, strict=True)
        ]

    def fits(self, sequence: TokenSequence, hit: int, chunk: int, kept_back: list[int]) -> bool:
        """Whether the known tokens of a waiting sequence, with `hit` blocks found, fit in what is free but not `kept_back`."""
        for (pool, window), kept in zip(self.groups, kept_back, strict=True):
            fresh = min(self.blocks(len(sequence.tokens)) - hit, self.most(len(sequence.tokens), chunk, window))
            shared = sequence.chain[self.passed(hit * self.block_size, window) + 1 : hit + 1]
            if fresh + pool.idle(shared) + kept > pool.free:
                return False
        return True

    # -- allocating and releasing

    def reach(self, sequence: TokenSequence) -> int:
        """The position up to which a running sequence can be computed with the free blocks; below `computed` without any."""
        size = self.block_size
        first = sequence.computed // size
        reach = len(sequence.tokens) + len(sequence.draft)
        for (pool, _), table in zip(self.groups, sequence.tables, strict=True):
            blocks = len(table) + pool.free
            if first < len(table) and pool.references[table[first]] > 1:
                # for the copy
                blocks -= 1
            reach = min(reach, blocks * size)
        return reach

    def take(self, sequence: TokenSequence, end: int, copies: list[tuple[int, int, int]]) -> None:
        """Allocate blocks for the positions from `computed` to `end`, which is within reach; adds the copies to be made."""
        first = sequence.computed // self.block_size
        blocks = self.blocks(end)
        for group, ((pool, _), table) in enumerate(zip(self.groups, sequence.tables, strict=True)):
            # only the first can be shared: later ones have never been computed
            if first < len(table):
                shared = table[first]
                table[first] = pool.own(shared)
                if table[first] != shared:
                    copies.append((group, shared, table[first]))
            while len(table) < blocks:
                table.append(pool.allocate())
        sequence.reserved = blocks * self.block_size

    def trim(self, sequence: TokenSequence, computed: int) -> None:
        """Release the blocks beyond `computed` tokens: the drafts in them were rejected."""
        kept = self.blocks(computed)
        for (pool, _), table in zip(self.groups, sequence.tables, strict=True):
            while len(table) > kept:
                pool.release(table.pop())
        sequence.reserved = min(sequence.reserved, kept * self.block_size)

    def advance(self, sequence: TokenSequence) -> None:
        """After `computed` has grown: seal the blocks that are full, and release those behind every window."""
        if self._share_prefixes and (sequence.sealed + 1) * self.block_size <= sequence.computed:
            self._seal(sequence)
        for group, pool, window in self._windowed:
            passed = self.passed(sequence.computed, window)
            if passed > sequence.passed[group]:
                table = sequence.tables[group]
                # they stay in the prefix cache; the first ones are evicted first, as a repeated prompt needs the last ones
                for block in range(sequence.passed[group], passed):
                    pool.release(table[block])
                    table[block] = -1
                sequence.passed[group] = passed

    def release(self, sequence: TokenSequence) -> None:
        """Release all blocks of a sequence, the last first, so that its prefix stays in the cache longest."""
        for (pool, _), table in zip(self.groups, sequence.tables, strict=False):
            for block in reversed(table):
                if block >= 0:
                    pool.release(block)
        sequence.tables = []
        sequence.passed = []
        sequence.chain = []
        sequence.computed = 0

    def branch(self, parent: TokenSequence, child: TokenSequence, computed: int) -> bool:
        """Let the child share the blocks of the first `computed` tokens, which the parent has computed.

        False, and nothing done, where the parent has released keys within the child's window.
        """
        if any(parent.passed[group] > self.passed(computed, window) for group, _, window in self._windowed):
            return False
        blocks = self.blocks(computed)
        for (pool, window), table in zip(self.groups, parent.tables, strict=True):
            passed = self.passed(computed, window)
            for block in table[passed:blocks]:
                pool.share(block)
            child.tables.append([-1] * passed + table[passed:blocks])
            child.passed.append(passed)
        full = computed // self.block_size
        child.chain = parent.chain[: full + 1]
        child.computed = computed
        child.sealed = min(parent.sealed, full)
        child.reserved = 0
        parent.reserved = min(parent.reserved, computed)
        return True

    # -- prefixes

    def match(self, sequence: TokenSequence) -> int:
        """The most blocks of a waiting sequence that are cached, from its beginning on; a token is left to compute.

        Layers with a window need only the blocks within the window of the first query after them, and linear attention its
        state there. Where blocks are found beyond the last state, the text parts from an earlier one: the position is noted.
        """
        if not self._share_prefixes:
            return 0
        size = self.block_size
        most = len(sequence.tokens) - 1
        if not self._share_generated:
            most = min(most, sequence.prompt_length)
        # cached blocks give neither logits nor hidden states
        for wanted_from in (sequence.logits_from, sequence.computed_from):
            if wanted_from is not None:
                most = min(most, wanted_from)
        most //= size
        chain = self.extend_chain(sequence, most)
        for pool, window in self.groups:
            if window is None:
                most = next((length for length in range(most) if chain[length + 1] not in pool), most)
        usable = [length * size % self._align == 0 for length in range(most + 1)]
        for _, pool, window in self._windowed:
            consecutive = 0
            for length in range(1, most + 1):
                consecutive = consecutive + 1 if chain[length] in pool else 0
                usable[length] &= consecutive >= length - self.passed(length * size, window)
        most = max(length for length in range(most + 1) if usable[length])
        if self._snapshots is None:
            return most
        sequence.partings = {most * size}
        return next((length for length in range(most, 0, -1) if usable[length] and chain[length] in self._snapshots), 0)

    def common(self, sequence: TokenSequence, other: TokenSequence) -> int:
        """Blocks of a waiting sequence, after `match`, that a running one with the same prefix has sealed or will seal."""
        if not self._share_prefixes:
            return 0
        # equal hashes have equal ones before them
        most = min(len(sequence.chain), len(other.chain), self.findable(other, len(other.tokens)) // self.block_size + 1)
        return bisect_left(range(1, most), True, key=lambda length: sequence.chain[length] != other.chain[length])

    def begin(self, sequence: TokenSequence, hit: int) -> None:
        """Tables for a sequence that starts, with the `hit` blocks that `match` found."""
        for pool, window in self.groups:
            passed = self.passed(hit * self.block_size, window)
            table = [-1] * passed
            for key in sequence.chain[passed + 1 : hit + 1]:
                table.append(pool.share_found(key))
            sequence.tables.append(table)
            sequence.passed.append(passed)
        sequence.sealed = hit
        sequence.computed = sequence.reserved = hit * self.block_size

    def forget(self) -> None:
        """Empty the prefix cache. New hash chains have another root; running sequences keep their old one."""
        self.epoch += 1
        for pool, _ in self.groups:
            pool.forget()

    def extend_chain(self, sequence: TokenSequence, blocks: int) -> list[bytes]:
        """The hash chain of a sequence's text, the root first, up to at least `blocks` blocks."""
        chain, size = sequence.chain, self.block_size
        if not chain:
            chain.append(root_hash(sequence.salt, self.epoch))
        for start in range(size * (len(chain) - 1), size * blocks, size):
            images = image_key(sequence.images, start, start + size) if sequence.images else b""
            chain.append(chain_hash(chain[-1], sequence.tokens[start : start + size], images))
        return chain

    def findable(self, sequence: TokenSequence, tokens: int) -> int:
        """Of the first `tokens` tokens, those that may enter the prefix cache when they are computed."""
        if self._share_generated:
            return tokens
        # a chunk that the prompt's end cuts short is computed in another shape than in a longer prompt
        return min(tokens, sequence.prompt_length - sequence.prompt_length % self._align)

    def _seal(self, sequence: TokenSequence) -> None:
        full = self.findable(sequence, sequence.computed) // self.block_size
        chain = self.extend_chain(sequence, full)
        for (pool, _), table in zip(self.groups, sequence.tables, strict=True):
            for block in range(sequence.sealed, full):
                pool.seal(table[block], chain[block + 1])
        sequence.sealed = max(sequence.sealed, full)
