"""The waiting queue and the running list: how a sequence is admitted, moves and ends. Pure Python: no tensors."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from operator import attrgetter

from bessemer.core.errors import RequestError
from bessemer.inference.scheduling.block_tables import BlockTables
from bessemer.inference.scheduling.recurrent_states import States
from bessemer.inference.scheduling.sequence import TokenSequence


def kept_back(running: Iterable[TokenSequence], tables: BlockTables, chunk: int) -> list[int]:
    """Blocks of each group that are reserved for running sequences: what their prompts still need, and one more for each.

    A sequence that took these would be admitted only to be preempted.
    """
    needs = [tables.outstanding(sequence, chunk) for sequence in running]
    return [len(needs) + sum(missing) for missing in zip(*needs, strict=True)] if needs else [0] * len(tables.groups)


def is_coming(sequence: TokenSequence, hit: int, running: list[TokenSequence], tables: BlockTables) -> bool:
    """Whether a running prompt is about to compute at least half of what a waiting sequence lacks: waiting is then faster.

    Requests that share a long prefix often arrive together. The running sequence advances, or is preempted, which ends the
    wait. The position where the two part is added to its `partings`, so that it keeps its state there.
    """
    size = tables.block_size
    if len(sequence.chain) < 2:  # shorter than a block, it shares none
        return False
    lacks = len(sequence.tokens) - hit * size
    for other in running:
        if len(other.tokens) - other.computed > 1:
            common = tables.common(sequence, other) * size
            if common > other.computed and 2 * (common - hit * size) >= lacks:
                other.partings.add(common)
                return True
    return False


_urgency = attrgetter("order")


class SequenceQueues:
    """Waiting and running sequences, each in order of urgency. tables and states: blocks and slots of the running ones.

    The other arguments are those of `Scheduler`.
    """

    def __init__(
        self, tables: BlockTables, states: States, *, max_num_seqs: int, max_waiting: int | None, align: int | None
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_waiting = max_waiting
        self.states = states
        self.groups = tables.groups
        self._tables = tables
        self._align = align
        self._has_states = states.needed
        self._waiting: list[TokenSequence] = []
        self._running: list[TokenSequence] = []
        self._arrivals = 0
        self._births = 0
        #: Since the start.
        self.preemptions = 0

    @property
    def tables(self) -> BlockTables:
        """The block tables, with the pools and the prefix cache."""
        return self._tables

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that run."""
        return len(self._running)

    @property
    def empty_places(self) -> int:
        """How many more sequences could run."""
        return self.max_num_seqs - len(self._running)

    @property
    def may_admit(self) -> bool:
        """Whether a sequence that waits could begin in the next step: in an empty place, or in that of a less urgent one."""
        return bool(self._waiting) and (self._has_place() or self._waiting[0].priority < self._running[-1].priority)

    def longest(self, most: int) -> int:
        """The most tokens of one sequence that the memory holds, at most `most`. Depends on nothing that changes."""
        # a model may declare a context that no list could count
        return bisect_right(range(1, min(most, sys.maxsize - 1) + 1), False, key=lambda length: not self._holds(length))

    def check(self, limit: int) -> None:
        """Raises RequestError when a sequence of `limit` tokens could not fit even alone. Depends on nothing that changes."""
        if not self._holds(limit):
            raise RequestError(
                f"the request may come to {limit:,} tokens and the memory for keys and values holds "
                f"{self.longest(limit):,}; ask for fewer tokens or give the engine more memory"
            )

    def _holds(self, length: int) -> bool:
        # the last token is never computed
        return all(self._tables.most(length - 1, self._align or 1, window) <= pool.total for pool, window in self.groups)

    def enqueue(self, sequence: TokenSequence) -> None:
        """Add a sequence to the waiting queue.

        Raises RequestError when it could not fit in the memory even alone, or when the queue is full.
        """
        self.check(sequence.limit)
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting + self.empty_places:
            raise RequestError(
                f"{len(self._waiting):,} requests wait already and max_waiting is {self.max_waiting:,}; try again later"
            )
        self._arrivals += 1
        self._join(sequence, self._arrivals)

    def abort(self, sequence: TokenSequence) -> None:
        """End a sequence in any state and free its blocks at once. Its chunk of the current step is not committed."""
        if sequence.status != "finished":
            self.finish(sequence)

    def finish(self, sequence: TokenSequence, successors: Sequence[TokenSequence] = ()) -> None:
        """End a sequence. Its blocks are free; sealed ones stay in the prefix cache until the memory is needed.

        successors: sequences of the same prompt. Its place is theirs, and they are forked from what it has computed of the
        prompt, as `fork`.
        """
        assert sequence.status != "finished", "a sequence ends once"
        queue = self._running if sequence.status == "running" else self._waiting
        del queue[bisect_left(queue, sequence.order, key=_urgency)]
        for successor in successors:
            self._fork(sequence, successor, min(sequence.computed, successor.prompt_length))
        self._release(sequence)
        sequence.status = "finished"

    def fork(self, parent: TokenSequence, child: TokenSequence) -> None:
        """Add a sequence that shares what the parent has computed of their common text; the first to write copies.

        The child begins with the parent's computed tokens, or is shorter (a parallel sample: the prompt alone). It has the
        parent's arrival, and max_waiting does not refuse it. The child waits, and later finds the parent's sealed blocks and
        last snapshot in the prefix cache, in three cases: max_num_seqs are running, the parent's window has released blocks
        that the child needs, or the model has recurrent states. Raises RequestError when it could not fit alone.
        """
        self._fork(parent, child, parent.computed)

    def _fork(self, parent: TokenSequence, child: TokenSequence, most: int) -> None:
        """Fork from at most `most` of the parent's computed tokens."""
        assert child.salt == parent.salt and child.prompt_length == parent.prompt_length, "a child answers the same request"
        self.check(child.limit)
        computed = min(most, len(child.tokens) - 1)
        assert child.tokens[:computed] == parent.tokens[:computed], "a child begins with its parent's text"
        if self._align is not None and computed < child.prompt_length:
            # the last chunk of the prompt is computed whole, as the parent did
            computed -= computed % self._align
        self._join(child, parent.order[1])
        if computed and not self._has_states and self.empty_places and self._tables.branch(parent, child, computed):
            self._start(child, computed)

    def preempt_all(self) -> None:
        """Preempt all running sequences: their keys are computed again."""
        while self._running:
            self._preempt()

    def preempt(self, sequence: TokenSequence) -> None:
        """Preempt a running sequence: its keys are computed again."""
        self._preempt(bisect_left(self._running, sequence.order, key=_urgency))

    def shift(self, sequence: TokenSequence) -> None:
        """Drop a part of a sequence's text (`TokenSequence.drop_middle`). It waits again, at the place of its arrival, and the
        keys of what is left are computed again: they depend on all tokens before them, and on their positions."""
        if sequence.status == "running":
            self._suspend(bisect_left(self._running, sequence.order, key=_urgency))
        sequence.drop_middle()

    def forget(self) -> None:
        """Empty the prefix cache: the weights have changed."""
        self._tables.forget()
        self.states.pool.forget()
        for sequence in self._waiting:
            sequence.chain = []

    # -- inside

    def _join(self, sequence: TokenSequence, arrival: int) -> None:
        assert 0 < len(sequence.tokens) < sequence.limit, "a sequence has a token and room for one more"
        assert 0 < sequence.prompt_length <= len(sequence.tokens)
        self._births += 1
        sequence.order = (sequence.priority, arrival, self._births)
        sequence.status = "waiting"
        insort(self._waiting, sequence, key=_urgency)

    def _start(self, sequence: TokenSequence, hit: int) -> None:
        """Move a sequence from the waiting queue to the running list; `hit` of its blocks were found."""
        del self._waiting[bisect_left(self._waiting, sequence.order, key=_urgency)]
        insort(self._running, sequence, key=_urgency)
        sequence.status = "running"
        if self._has_states:
            self.states.begin(sequence, hit)

    def _release(self, sequence: TokenSequence) -> None:
        if self._has_states:
            self.states.release(sequence)
        self._tables.release(sequence)

    def _preempt(self, place: int = -1) -> TokenSequence:
        """Preempt a running sequence, by default the least urgent."""
        self.preemptions += 1
        return self._suspend(place)

    def _suspend(self, place: int) -> TokenSequence:
        """Let a running sequence give up its blocks and wait again."""
        suspended = self._running.pop(place)
        self._release(suspended)
        suspended.status = "waiting"
        suspended.draft = []
        insort(self._waiting, suspended, key=_urgency)
        return suspended

    def _has_place(self) -> bool:
        return self.empty_places > 0 and (not self._has_states or self.states.has_slot)
