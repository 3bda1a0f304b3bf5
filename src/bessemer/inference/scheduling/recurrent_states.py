"""Recurrent states of linear attention: a slot for each running sequence, and snapshots that other sequences can start from.

Keys and values of a prefix are there as long as their blocks are. A state is the sum of all that was read, and cannot be
taken back: a sequence that starts at a block's end needs the state as it was there. A state is as large as the keys and
values of some hundred tokens or more, so it is kept at a few ends of blocks only, in snapshots of their own, under the hash
of all the text before.
"""

from __future__ import annotations

from collections import OrderedDict

from bessemer.inference.scheduling.sequence import TokenSequence

#: A prompt of fewer chunks keeps only the states at its end: to read it again is cheap.
_LEAST_SPACED = 8


class SnapshotPool:
    """Snapshots by number. A snapshot is blank, being written, or sealed under the hash of the text before it.

    Blank ones are allocated first, then the sealed one that was used longest ago. A `passing` one follows a sequence, and is
    freed when the next one is there, unless another sequence has used it. `hits` and `evictions` count since the start.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.hits = 0
        self.evictions = 0
        self._blank = list(range(total - 1, -1, -1))
        self._sealed: OrderedDict[bytes, int] = OrderedDict()
        self._passing: set[bytes] = set()

    @property
    def free(self) -> int:
        """How many snapshots can be written: blank ones, and sealed ones, which may be evicted."""
        return len(self._blank) + len(self._sealed)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sealed

    def find(self, key: bytes) -> int | None:
        """The snapshot of a text."""
        return self._sealed.get(key)

    def touch(self, key: bytes) -> None:
        """Make an existing snapshot the last to be evicted, and no longer passing."""
        self._sealed.move_to_end(key)
        self._passing.discard(key)

    def use(self, key: bytes) -> int:
        """The number of an existing snapshot, counted as a hit."""
        self.touch(key)
        self.hits += 1
        return self._sealed[key]

    def allocate(self) -> int | None:
        """A snapshot to write; None where all are being written."""
        if self._blank:
            return self._blank.pop()
        if not self._sealed:
            return None
        key, number = self._sealed.popitem(last=False)
        self._passing.discard(key)
        self.evictions += 1
        return number

    def give_back(self, number: int) -> None:
        """Free a snapshot that was allocated and is not needed."""
        self._blank.append(number)

    def seal(self, number: int, key: bytes, passing: bool) -> None:
        """Put a written snapshot into the prefix cache. Where another one holds the same text already, that one stays."""
        if key in self._sealed:
            self._sealed.move_to_end(key)
            if not passing:
                self._passing.discard(key)
            self.give_back(number)
            return
        self._sealed[key] = number
        if passing:
            self._passing.add(key)

    def drop(self, key: bytes) -> None:
        """Free a passing snapshot whose sequence has advanced, unless another sequence has used it."""
        if key in self._passing:
            self._passing.remove(key)
            self._blank.append(self._sealed.pop(key))

    def forget(self) -> None:
        """Drop all snapshots: the weights have changed."""
        self._blank += self._sealed.values()
        self._sealed.clear()
        self._passing.clear()


class States:
    """The slots of running sequences, and where the states of a text are kept for others.

    A prompt keeps states at its last two ends of blocks (the same prompt again leaves a token to compute, a longer one does
    not); where another text parts from it, as far as blocks or waiting requests show; and at 2ⁿ and 3 · 2ⁿ chunks, so that a
    text which parts from it anywhere finds two thirds of the shared prefix. Beside these a sequence has one that follows it,
    at the last end of a block that it has reached: for the next turn of a conversation, and for a preemption.
    """

    def __init__(self, slots: int, snapshots: int, block_size: int, chunk: int) -> None:
        """slots: 0 for a model without states. snapshots: 0 without a prefix cache. chunk: a multiple of block_size, at whose
        multiples a state is of use."""
        assert chunk % block_size == 0 and (slots or not snapshots)
        self._slots = list(range(slots - 1, -1, -1)) if slots else None
        self.pool = SnapshotPool(snapshots)
        self._block_size = block_size
        self._chunk = chunk
        self._restored: list[tuple[int, int]] = []

    @property
    def needed(self) -> bool:
        """Whether the model has states."""
        return self._slots is not None

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may run."""
        return bool(self._slots)

    def begin(self, sequence: TokenSequence, hit: int) -> None:
        """Give a sequence its slot, with the state after its first `hit` blocks, of which there is a snapshot."""
        assert self._slots, "a running sequence has a slot"
        sequence.state_slot = self._slots.pop()
        if hit:
            self._restored.append((self.pool.use(sequence.chain[hit]), sequence.state_slot))

    def release(self, sequence: TokenSequence) -> None:
        """Free the slot, and the snapshots that are not written yet."""
        if sequence.state_slot is None:
            return
        assert self._slots is not None
        self._slots.append(sequence.state_slot)
        for number in sequence.snapshots.values():
            self.pool.give_back(number)
        sequence.state_slot = None
        sequence.snapshots = {}
        sequence.following = None
        sequence.partings = set()

    def take_restored(self) -> list[tuple[int, int]]:
        """(snapshot, slot) of the sequences that started since the last call."""
        restored, self._restored = self._restored, []
        return restored

    def wanted(self, sequence: TokenSequence, start: int, known_end: int, end: int, findable: int) -> list[int]:
        """The positions after `start`, at most `end`, where a chunk's states are to be kept.

        From `known_end` on the tokens are draft tokens; beyond `findable` none enters the prefix cache.
        """
        chunk = self._chunk
        first, last = start // chunk + 1, min(end, findable) // chunk
        positions = [multiple * chunk for multiple in range(first, last + 1)]
        reached = min(known_end, findable) // chunk * chunk
        return [each for each in positions if each >= reached or self._stays(sequence, each)]

    def prepare(self, sequence: TokenSequence, positions: list[int], known_end: int) -> None:
        """Allocate snapshots for the states at these positions, except where they are kept already."""
        for position in positions:
            if position <= known_end:
                key = sequence.chain[position // self._block_size]
                if key in self.pool:
                    self.pool.touch(key)
                    continue
            number = self.pool.allocate()
            if number is not None:
                sequence.snapshots[position] = number

    def advance(self, sequence: TokenSequence) -> None:
        """After a chunk: seal the written snapshots up to `computed`. The sequence's hash chain reaches as far."""
        for position, number in sorted(sequence.snapshots.items()):
            if position > sequence.computed:
                self.pool.give_back(number)
                continue
            key, stays = sequence.chain[position // self._block_size], self._stays(sequence, position)
            self.pool.seal(number, key, passing=not stays)
            if not stays:
                if sequence.following is not None and sequence.following != key:
                    self.pool.drop(sequence.following)
                sequence.following = key
        sequence.snapshots = {}

    def _stays(self, sequence: TokenSequence, position: int) -> bool:
        """Whether a state is kept when the sequence has advanced."""
        if position in sequence.partings:
            return True
        prompt, chunk = sequence.prompt_length, self._chunk
        if position > prompt:
            return False
        chunks = position // chunk
        odd = chunks // (chunks & -chunks)
        spaced = chunks >= _LEAST_SPACED and odd in (1, 3)
        return spaced or position in ((prompt - 1) // chunk * chunk, prompt // chunk * chunk)
