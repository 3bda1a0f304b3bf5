"""States of linear attention: a slot for each running sequence, and snapshots that other texts can begin with.

Keys and values of a prefix are there as long as their pages are. A state is the sum of all that was read, and going back is
not possible: who is to begin at a block's end needs the state as it was there. It is large, as large as the keys and values of
some hundred tokens or more, so it is kept at a few ends of blocks only, in places of their own, under the hash of all the text
before.
"""

from __future__ import annotations

from collections import OrderedDict

from bessemer.inference.scheduling.sequence import TokenSequence

#: Below so many pieces, a prompt keeps no states but those at its end: to read so little again is cheap.
_LEAST_SPACED = 8


class SnapshotPool:
    """Places for snapshots, by number. A place is blank, being written, or sealed under the hash of the text before it.

    Blank ones are given out first, then the sealed one that was used longest ago. One that is `passing` stands for a sequence
    that moves on, and goes when the next is there, unless somebody else has asked for it. `hits` and `evictions` count since
    the start.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.hits = self.evictions = 0
        self._blank = list(range(total - 1, -1, -1))
        self._sealed: OrderedDict[bytes, int] = OrderedDict()
        self._passing: set[bytes] = set()

    @property
    def free(self) -> int:
        """Places that are not being written."""
        return len(self._blank) + len(self._sealed)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sealed

    def find(self, key: bytes) -> int | None:
        """The place of the snapshot of a text."""
        return self._sealed.get(key)

    def touch(self, key: bytes) -> None:
        """Somebody wants the snapshot of this text, which is there, to stay."""
        self._sealed.move_to_end(key)
        self._passing.discard(key)

    def use(self, key: bytes) -> int:
        """The place of the snapshot of a text, which is there: a hit."""
        self.touch(key)
        self.hits += 1
        return self._sealed[key]

    def allocate(self) -> int | None:
        """A place to be written; None where all are being written."""
        if self._blank:
            return self._blank.pop()
        if not self._sealed:
            return None
        key, number = self._sealed.popitem(last=False)
        self._passing.discard(key)
        self.evictions += 1
        return number

    def give_back(self, number: int) -> None:
        """A place that was allocated is not needed."""
        self._blank.append(number)

    def seal(self, number: int, key: bytes, passing: bool) -> None:
        """What was written is the state after a text. Where another place holds it already, that one stays."""
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
        """Its sequence has moved on: free the place of a snapshot that nobody else has asked for."""
        if key in self._passing:
            self._passing.remove(key)
            self._blank.append(self._sealed.pop(key))

    def forget(self) -> None:
        """Drop all: the weights that computed them are no more."""
        self._blank += self._sealed.values()
        self._sealed.clear()
        self._passing.clear()


class States:
    """Which slot is whose, and where the states of a text are kept for others.

    A prompt keeps them at its last two ends of blocks (its own text asked again leaves a token to compute, a longer one does
    not); where another text parts from it, as far as pages or waiting requests show; and at 2ⁿ and 3 · 2ⁿ pieces, so that a
    text which parts from it anywhere finds two thirds of what it shares. Beside these a sequence has one that follows it, at
    the last end of a block that it has come to: for the next turn of a conversation, and when it is preempted.
    """

    def __init__(self, slots: int, snapshots: int, block_size: int, piece: int) -> None:
        """slots: 0 for a model without states. snapshots: places; 0 where nothing is shared. piece: a multiple of block_size,
        at whose multiples a state is of use."""
        assert piece % block_size == 0 and (slots or not snapshots)
        self._slots = list(range(slots - 1, -1, -1)) if slots else None
        self.pool = SnapshotPool(snapshots)
        self._block_size, self._piece = block_size, piece
        self._restored: list[tuple[int, int]] = []

    @property
    def needed(self) -> bool:
        """Whether the model has states."""
        return self._slots is not None

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may run."""
        return self._slots is None or bool(self._slots)

    def begin(self, sequence: TokenSequence, hit: int) -> None:
        """Give a sequence its slot, with the state after its first `hit` blocks, of which there is a snapshot."""
        if self._slots is None:
            return
        sequence.state_slot = self._slots.pop()
        if hit:
            self._restored.append((self.pool.use(sequence.chain[hit]), sequence.state_slot))

    def release(self, sequence: TokenSequence) -> None:
        """Take back the slot; snapshots stay, but for those that are not written yet."""
        if self._slots is None or sequence.state_slot is None:
            return
        self._slots.append(sequence.state_slot)
        for number in sequence.snapshots.values():
            self.pool.give_back(number)
        sequence.state_slot, sequence.snapshots, sequence.following = None, {}, None
        sequence.partings = set()

    def take_restored(self) -> list[tuple[int, int]]:
        """(snapshot, slot) of all that began since this was asked."""
        restored, self._restored = self._restored, []
        return restored

    def wanted(self, sequence: TokenSequence, start: int, known_end: int, end: int, findable: int) -> list[int]:
        """The positions behind `start`, at most `end`, where a work's states are to be kept. From `known_end` on the tokens
        are guesses; beyond `findable` nobody will look."""
        piece = self._piece
        first, last = start // piece + 1, min(end, findable) // piece
        positions = [multiple * piece for multiple in range(first, last + 1)]
        reached = min(known_end, findable) // piece * piece
        return [each for each in positions if each >= reached or self._stays(sequence, each)]

    def prepare(self, sequence: TokenSequence, positions: list[int], known_end: int) -> None:
        """Places for the states at these positions, `sequence.snapshots`, except where they are kept already."""
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
        """After a work: let others find what was written as far as the sequence has come. Its chain goes as far."""
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
        """Whether a state is kept when the sequence has moved on."""
        if position in sequence.partings:
            return True
        prompt, piece = sequence.prompt_length, self._piece
        if position > prompt:
            return False
        pieces = position // piece
        odd = pieces // (pieces & -pieces)
        spaced = pieces >= _LEAST_SPACED and odd in (1, 3)
        return spaced or position in ((prompt - 1) // piece * piece, prompt // piece * piece)
