"""Block tables: the KV blocks of each sequence in every group of layers, and the prefixes that it can share.

A table names the block of every `block_size` positions. Blocks before `computed` may be shared with other sequences. The
block that is written next never is, nor is it in the prefix cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from bessemer.inference.scheduling.block_pool import BlockGroup, chain_hash, root_hash
from bessemer.inference.scheduling.recurrent_states import SnapshotPool
from bessemer.inference.scheduling.sequence import TokenSequence


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
        self._epoch = 0

    # -- counts of blocks

    def blocks(self, tokens: int) -> int:
        """Blocks that hold the first `tokens` tokens."""
        return -(-tokens // self.block_size)

    def most(self, tokens: int, chunk: int, window: int | None) -> int:
        """The most blocks that a sequence of `tokens` computed tokens holds at once in a group, in chunks of `chunk`."""
        whole = self.blocks(tokens)
        if window is None:
            return whole
        # neighbouring positions that begin at the end of a block lie in the most blocks
        positions = window - 1 + chunk
        return min(whole, (positions + self.block_size - 2) // self.block_size + 1)

    def passed(self, position: int, window: int | None) -> int:
        """Blocks wholly before the window of a query at `position`."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def outstanding(self, sequence: TokenSequence, chunk: int) -> list[int]:
        """Per group: blocks that a running sequence has yet to take for its known tokens, in chunks of `chunk`."""
        known = len(sequence.tokens)
        return [
            min(self.blocks(known) - len(table), self.most(known, chunk, window) - (len(table) - passed))
            for (_, window), table, passed in zip(self.groups, sequence.tables, sequence.passed, strict=True)
        ]

    def fits(self, sequence: TokenSequence, hit: int, chunk: int, kept_back: list[int]) -> bool:
        """Whether the known tokens of a waiting sequence, with `hit` blocks found, fit in what is free but not `kept_back`."""
        for (pool, window), kept in zip(self.groups, kept_back, strict=True):
            fresh = min(self.blocks(len(sequence.tokens)) - hit, self.most(len(sequence.tokens), chunk, window))
            found = sequence.chain[self.passed(hit * self.block_size, window) + 1 : hit + 1]
            if fresh + pool.idle(found) + kept > pool.free:
                return False
        return True

    # -- allocating and releasing

    def reach(self, sequence: TokenSequence) -> int:
        """The position up to which free blocks let a running sequence compute; below `computed` where there is none."""
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
            # only the first can be shared: what comes after it was never computed
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
        sequence.sealed = 0
        sequence.reserved = 0

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
        # what is found has neither logits nor states
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
            found = 0
            for length in range(1, most + 1):
                found = found + 1 if chain[length] in pool else 0
                usable[length] &= found >= length - self.passed(length * size, window)
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
        self._epoch += 1
        for pool, _ in self.groups:
            pool.forget()

    def extend_chain(self, sequence: TokenSequence, blocks: int) -> list[bytes]:
        """The hash chain of a sequence's text, the root first, up to at least `blocks` blocks."""
        chain, size = sequence.chain, self.block_size
        if not chain:
            chain.append(root_hash(sequence.salt, self._epoch))
        for block in range(len(chain) - 1, blocks):
            chain.append(chain_hash(chain[-1], sequence.tokens[block * size : (block + 1) * size]))
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
