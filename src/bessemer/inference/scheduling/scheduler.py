"""Who computes what in the next step: continuous batching over pages, in plain Python with no device in it.

A sequence waits, runs (it has pages) and finishes. `schedule` says what every running one computes next, and `commit` writes
down what came of it. Urgency is (priority, arrival): the more urgent is served first, nobody overtakes the first that waits,
and when pages run out the least urgent that runs gives all of its own back and waits again, at the place of its arrival. It
keeps its tokens and computes their keys anew, or finds them. So the most urgent one always moves on, and everyone comes to
be the most urgent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from math import lcm
from operator import attrgetter

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.scheduling.admission import fits, is_coming
from bessemer.inference.scheduling.block_pool import Group
from bessemer.inference.scheduling.block_tables import BlockTables
from bessemer.inference.scheduling.recurrent_states import States
from bessemer.inference.scheduling.schedule import ScheduledChunk, SchedulerOutput
from bessemer.inference.scheduling.sequence import TokenSequence

__all__ = ["Group", "Plan", "Scheduler", "Work"]

_urgency = attrgetter("order")


class Scheduler:
    """Decides over pages, places and tokens of a step; every sequence that is added comes to its end.

    max_num_seqs: sequences that have pages at once. max_num_batched_tokens: tokens computed in one step; each running sequence that
    decodes has one of them, drafts and prompts share the rest. max_waiting: sequences beyond those for which a place is
    empty; None: any number. state_slots: places for the states of linear attention, one for each running sequence;
    snapshots: places for states at the ends of blocks, without which a model that has states shares no prefix. block_size:
    of a model without groups, tokens that are hashed at once.
    align: chunks of a prompt end at its multiples or at the prompt's end, and what comes after the prompt is computed token
    by token, even when it is computed again: in the same pieces whatever else runs. share_generated: False to seal and find
    only what was computed as part of a prompt, in whole pieces of `align`. share_prefixes: False to find nothing.

    Every work of a plan is committed, or its sequence aborted, before the next plan.
    Raises ConfigError where a step could be too small for what runs.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int | None = None,
        state_slots: int = 0,
        snapshots: int = 0,
        block_size: int = 1,
        align: int | None = None,
        share_generated: bool = True,
        share_prefixes: bool = True,
    ) -> None:
        least = max_num_seqs - 1 + (align or 1)
        if max_num_batched_tokens < least:
            raise ConfigError(
                f"a step of {max_num_batched_tokens} tokens is too small for {max_num_seqs} running requests"
                + (f" and pieces of {align} tokens" if align else "")
                + f": raise max_num_batched_tokens to at least {least}, or lower max_num_seqs"
            )
        self.max_num_seqs, self.max_num_batched_tokens, self.max_waiting = max_num_seqs, max_num_batched_tokens, max_waiting
        self._align = align
        groups = list(groups)
        shares = share_prefixes and bool(snapshots if state_slots else groups)
        size = groups[0].pool.block_size if groups else block_size
        self.states = States(state_slots, snapshots if shares else 0, size, lcm(size, align or 1))
        self._shares_states = shares and self.states.needed
        self._tables = BlockTables(
            groups,
            block_size=size,
            align=align or 1,
            share_generated=share_generated,
            share_prefixes=shares,
            snapshots=self.states.pool if self._shares_states else None,
        )
        self.groups = self._tables.groups
        # both in order of urgency
        self._waiting: list[TokenSequence] = []
        self._running: list[TokenSequence] = []
        self._arrivals = self._births = 0
        #: since the start: tokens that first admissions asked for, those of them found in the cache, and preemptions
        self.asked_tokens = self.found_tokens = self.preemptions = 0

    # -- what the engine asks

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self._running)

    def longest(self, most: int) -> int:
        """The most tokens of one sequence that the memory holds, at most `most`. It depends on nothing that changes."""
        return bisect_right(range(1, most + 1), False, key=lambda length: not self._holds(length))

    def check(self, sequence: TokenSequence) -> None:
        """Raises RequestError when a sequence could not fit in the memory even alone. It depends on nothing that changes."""
        if not self._holds(sequence.limit):
            raise RequestError(
                f"the request may come to {sequence.limit:,} tokens and the memory for keys and values holds "
                f"{self.longest(sequence.limit):,}; ask for fewer tokens or give the engine more memory"
            )

    def _holds(self, length: int) -> bool:
        # the last token is never computed
        return all(self._tables.most(length - 1, self._align or 1, window) <= pool.total for pool, window in self.groups)

    def add(self, sequence: TokenSequence) -> None:
        """Let a sequence wait for its turn.

        Raises RequestError when it could not fit in the memory even alone, or when the queue is full.
        """
        self.check(sequence)
        if self.max_waiting is not None:
            empty = self.max_num_seqs - len(self._running)
            if len(self._waiting) >= self.max_waiting + empty:
                raise RequestError(
                    f"{len(self._waiting):,} requests wait already and max_waiting is {self.max_waiting:,}; try again later"
                )
        self._arrivals += 1
        self._join(sequence, self._arrivals)

    def abort(self, sequence: TokenSequence) -> None:
        """End a sequence in any state; what it holds is free at once. A work of it that is under way is not committed."""
        if sequence.status != "finished":
            self.finish(sequence)

    def finish(self, sequence: TokenSequence) -> None:
        """End a sequence. Its pages are free; sealed ones are found by their text until the memory is needed."""
        assert sequence.status != "finished", "a sequence ends once"
        queue = self._running if sequence.status == "running" else self._waiting
        del queue[bisect_left(queue, sequence.order, key=_urgency)]
        self._release(sequence)
        sequence.status = "finished"

    def fork(self, parent: TokenSequence, child: TokenSequence) -> None:
        """Add a sequence that shares what the parent has computed of their common text; the first to write copies.

        The child begins with the parent's computed tokens or is shorter than they (a parallel sample: the prompt alone; a
        beam: all but the last token is the parent's). It has the parent's arrival, and no limit on waiting refuses it, since
        its request was taken. Where no place is empty, the parent's window does not reach back to where the child begins, or
        the model has states, it waits and finds the parent's sealed blocks and its last snapshot. Raises RequestError when it
        could not fit alone.
        """
        assert child.salt == parent.salt and child.prompt_length == parent.prompt_length, "a child answers the same request"
        self.check(child)
        computed = min(parent.computed, len(child.tokens) - 1)
        assert child.tokens[:computed] == parent.tokens[:computed], "a child begins with its parent's text"
        if self._align is not None and computed < child.prompt_length:
            # the last piece of the prompt is computed whole, as the parent did
            computed -= computed % self._align
        self._join(child, parent.order[1])
        if (
            computed
            and not self.states.needed
            and len(self._running) < self.max_num_seqs
            and self._tables.branch(parent, child, computed)
        ):
            self._start(child, computed)

    def preempt_all(self) -> None:
        """All that run wait again, at the places of their arrival: what they have read must be read anew."""
        while self._running:
            self._preempt()

    def forget(self) -> None:
        """Find nothing any more of what was computed so far: the weights have changed."""
        self._tables.forget()
        self.states.pool.forget()
        for sequence in self._waiting:
            sequence.chain = []

    # -- one step

    def schedule(self) -> SchedulerOutput:
        """What to compute next: one token (and drafts) of all that decode, then prompts, as far as tokens and pages reach.

        While there are prompts, drafts have at most half of what the decoding tokens leave of a step. They are given pages
        last, and nobody is preempted for them. The plan has a work while `has_work`.
        """
        copies: list[tuple[int, int, int]] = []
        preempted: list[TokenSequence] = []
        self._make_way(preempted)
        running = self._running
        decoding = proposed = 0
        for sequence in running:
            if len(sequence.tokens) - sequence.computed == 1:
                decoding += 1
                if sequence.draft:
                    proposed += _usable_drafts(sequence)
        budget = self.max_num_batched_tokens - decoding
        draft_budget = min(proposed, budget)
        if draft_budget and (decoding < len(running) or (self._waiting and self._has_place())):
            draft_budget = max(0, min(proposed, budget // 2, budget - (self._align or 1)))
        budget -= draft_budget

        decodes: list[TokenSequence] = []
        chunks: list[ScheduledChunk] = []
        index, short = 0, len(preempted)
        # the victims are at the end of the list, so none has a work yet
        while index < len(running):
            sequence = running[index]
            index += 1
            start = sequence.computed
            if len(sequence.tokens) - start == 1:
                if start < sequence.reserved or self._secure(sequence, 1, copies, preempted):
                    decodes.append(sequence)
            elif count := self._secure(sequence, budget, copies, preempted):
                chunks.append(ScheduledChunk(sequence, start, count, 0))
                budget -= count
        if len(preempted) == short:
            self._admit(budget, chunks, copies)
        if draft_budget:
            works = []
            for sequence in decodes:
                drafts = self._secure_drafts(sequence, draft_budget) if sequence.draft else 0
                draft_budget -= drafts
                works.append(ScheduledChunk(sequence, sequence.computed, 1 + drafts, drafts))
        else:
            works = [ScheduledChunk(sequence, sequence.computed, 1, 0) for sequence in decodes]
        works += chunks
        if self._shares_states:
            for work in works:
                self._prepare_snapshots(work)
        return SchedulerOutput(works, copies, preempted, self.states.take_restored())

    def commit(self, work: ScheduledChunk, tokens: Iterable[int]) -> None:
        """Write down a work that was computed: drafts that were accepted and one new token, or none where none is wanted.

        The last token has no keys yet. A work of an aborted sequence is left out.
        """
        sequence = work.sequence
        if sequence.status == "finished":
            return
        made = list(tokens)
        assert bool(made) == bool(work.wants), "a work gives tokens exactly where logits are wanted"
        assert len(made) <= 1 + work.drafts and len(sequence.tokens) + len(made) <= sequence.limit
        computed = work.start + work.count - work.drafts
        if work.drafts:
            assert made[:-1] == sequence.draft[: len(made) - 1], "only proposed tokens have keys"
            computed += len(made) - 1
            self._tables.trim(sequence, computed)
        if sequence.draft:
            sequence.draft = []
        sequence.tokens += made
        sequence.computed = computed
        self._tables.advance(sequence)
        if sequence.snapshots:
            self.states.advance(sequence)

    # -- waiting and running

    def _join(self, sequence: TokenSequence, arrival: int) -> None:
        assert 0 < len(sequence.tokens) < sequence.limit, "a sequence has a token and room for one more"
        assert 0 < sequence.prompt_length <= len(sequence.tokens)
        self._births += 1
        sequence.order = (sequence.priority, arrival, self._births)
        sequence.status = "waiting"
        insort(self._waiting, sequence, key=_urgency)

    def _start(self, sequence: TokenSequence, hit: int) -> None:
        """From the queue to the running ones, with so many blocks found."""
        del self._waiting[bisect_left(self._waiting, sequence.order, key=_urgency)]
        insort(self._running, sequence, key=_urgency)
        sequence.status = "running"
        self.states.begin(sequence, hit)

    def _release(self, sequence: TokenSequence) -> None:
        self.states.release(sequence)
        self._tables.release(sequence)

    def _preempt(self) -> TokenSequence:
        """The least urgent running sequence gives up its pages and waits again."""
        victim = self._running.pop()
        self._release(victim)
        victim.status = "waiting"
        insort(self._waiting, victim, key=_urgency)
        self.preemptions += 1
        return victim

    def _make_way(self, preempted: list[TokenSequence]) -> None:
        """Preempt sequences of a lower priority for the first that waits, as far as it needs their places or pages."""
        while self._waiting and self._running and self._waiting[0].priority < self._running[-1].priority:
            first = self._waiting[0]
            if self._has_place() and self._fits(first, self._tables.match(first)):
                return
            preempted.append(self._preempt())

    def _has_place(self) -> bool:
        return len(self._running) < self.max_num_seqs and self.states.has_slot

    def _admit(self, budget: int, chunks: list[ScheduledChunk], copies: list[tuple[int, int, int]]) -> None:
        """Start those that wait, most urgent first, while there are a place, tokens and pages for the next."""
        while self._waiting and budget and self._has_place():
            sequence = self._waiting[0]
            hit = self._tables.match(sequence)
            start = hit * self._tables.block_size
            if self._chunk_end(sequence, start, budget) == start or not self._fits(sequence, hit):
                return
            if is_coming(sequence, hit, self._running, self._tables):
                return
            self._tables.begin(sequence, hit)
            self._start(sequence, hit)
            end = self._chunk_end(sequence, start, min(budget, self._tables.reach(sequence) - start))
            assert end > start, "what fits can begin"
            self._tables.take(sequence, end, copies)
            chunks.append(ScheduledChunk(sequence, start, end - start, 0))
            budget -= end - start
            if not sequence.admitted:
                sequence.admitted = True
                sequence.cached = start
                self.asked_tokens += len(sequence.tokens)
                self.found_tokens += start

    def _fits(self, sequence: TokenSequence, hit: int) -> bool:
        return fits(sequence, hit, self._running, self._tables, self.max_num_batched_tokens)

    # -- one sequence's part of a step

    def _prepare_snapshots(self, work: ScheduledChunk) -> None:
        sequence, end = work.sequence, work.start + work.count
        known_end = end - work.drafts
        findable = self._tables.findable(sequence, end)
        positions = self.states.wanted(sequence, work.start, known_end, end, findable)
        if positions:
            self._tables.extend_chain(sequence, min(known_end, findable) // self._tables.block_size)
            self.states.prepare(sequence, positions, known_end)

    def _chunk_end(self, sequence: TokenSequence, start: int, budget: int) -> int:
        """Where a chunk from `start` ends that computes at most `budget` known tokens; `start` where none may begin."""
        end = max(start, min(start + budget, len(sequence.tokens)))
        if self._align is None:
            return end
        if start >= sequence.prompt_length:
            return min(end, start + 1)
        if end >= sequence.prompt_length:
            return sequence.prompt_length
        return max(start, end - end % self._align)

    def _secure(
        self, sequence: TokenSequence, budget: int, copies: list[tuple[int, int, int]], preempted: list[TokenSequence]
    ) -> int:
        """Take blocks for the next chunk of a running sequence, preempting less urgent ones, or itself. Tokens of the chunk."""
        start = sequence.computed
        if self._chunk_end(sequence, start, budget) == start:
            return 0
        while True:
            # rather a shorter chunk than a preemption
            end = self._chunk_end(sequence, start, min(budget, self._tables.reach(sequence) - start))
            if end > start:
                self._tables.take(sequence, end, copies)
                return end - start
            preempted.append(self._preempt())
            if preempted[-1] is sequence:
                return 0

    def _secure_drafts(self, sequence: TokenSequence, budget: int) -> int:
        """Take blocks for drafts behind the next token, as far as they are free. Drafts that have room."""
        next_end = sequence.computed + 1
        drafts = min(_usable_drafts(sequence), budget)
        if next_end + drafts > sequence.reserved:
            drafts = min(drafts, self._tables.reach(sequence) - next_end)
            self._tables.take(sequence, next_end + drafts, [])
        return drafts


def _usable_drafts(sequence: TokenSequence) -> int:
    """Drafts that may be verified: after them comes one more token within the limit."""
    return min(len(sequence.draft), sequence.limit - len(sequence.tokens) - 1)
