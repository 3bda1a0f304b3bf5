"""Continuous-batching scheduler. Pure Python: no tensors.

A sequence waits, runs (it has blocks) and finishes. `schedule` decides what every running sequence computes next; `commit`
records the result. Urgency is (priority, arrival). The most urgent sequence is served first, and no sequence overtakes the
first that waits. When blocks run out, the least urgent running sequence is preempted: it gives up its blocks and waits
again at the place of its arrival. It keeps its tokens, and computes their keys again or finds them in the prefix cache. So
the most urgent sequence always advances, and every sequence becomes the most urgent in time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import lcm

from bessemer.core.errors import ConfigError
from bessemer.inference.scheduling.block_tables import BlockGroup, BlockTables
from bessemer.inference.scheduling.queues import SequenceQueues, is_coming, kept_back
from bessemer.inference.scheduling.recurrent_states import States
from bessemer.inference.scheduling.sequence import Copies, ScheduledChunk, SchedulerOutput, TokenSequence, before_whole

#: Stands in a sequence for a token that is still being computed.
PLACEHOLDER = 0

__all__ = ["BlockGroup", "ScheduledChunk", "Scheduler", "SchedulerOutput"]


class Scheduler(SequenceQueues):
    """Decides which sequences run, which tokens a step computes and in which blocks their keys lie.

    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens computed in one step; each running sequence that
    decodes has one of them, drafts and prompts share the rest. max_logits_rows: of the tokens of prompts in one step, those
    whose logits are wanted because their sequence wants all (`logits_from`), at least `align`. max_waiting: sequences that may
    wait beyond the places that are empty; None: any number. state_slots: slots for the states of linear attention, one for each
    running sequence. snapshots: of states; without them a model that has states shares no prefix. block_size: tokens hashed at
    once, in a model without groups. align: chunks of a prompt end at its multiples or at the prompt's end, and what comes after
    the prompt is computed token by token, also after a preemption: the chunks are the same whatever else runs. least_chunk:
    most tokens that no chunk may cut (`ImageMark.whole`). share_generated: False to cache only what was computed as part of a
    prompt, in whole multiples of `align`. share_prefixes: False for no prefix cache.

    Every chunk of a step is committed, or its sequence aborted, before the next step; or committed ahead (`commit_ahead`), and
    its token before the one after.
    Raises ConfigError where a step could be too small for what runs.
    """

    def __init__(
        self,
        groups: Iterable[BlockGroup],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_logits_rows: int = sys.maxsize,
        max_waiting: int | None = None,
        state_slots: int = 0,
        snapshots: int = 0,
        block_size: int = 1,
        align: int | None = None,
        least_chunk: int = 1,
        share_generated: bool = True,
        share_prefixes: bool = True,
    ) -> None:
        least_chunk = max(align or 1, least_chunk)
        least = max_num_seqs - 1 + least_chunk
        if max_num_batched_tokens < least:
            raise ConfigError(
                f"a step of {max_num_batched_tokens} tokens is too small for {max_num_seqs} running requests"
                + (f" and chunks of {least_chunk} tokens" if least_chunk > 1 else "")
                + f": raise max_num_batched_tokens to at least {least}, or lower max_num_seqs"
            )
        self.max_num_batched_tokens = max_num_batched_tokens
        assert max_logits_rows >= least_chunk, "the first sequence of a step can always go on"
        self._least_chunk = least_chunk
        self.max_logits_rows = max_logits_rows
        #: Rows of logits that the step being scheduled may still take.
        self._logits_rows = max_logits_rows
        groups = list(groups)
        shares = share_prefixes and bool(snapshots if state_slots else groups)
        size = groups[0].pool.block_size if groups else block_size
        states = States(state_slots, snapshots if shares else 0, size, lcm(size, align or 1))
        self._shares_states = shares and states.needed
        tables = BlockTables(
            groups,
            block_size=size,
            align=align or 1,
            share_generated=share_generated,
            share_prefixes=shares,
            snapshots=states.pool if self._shares_states else None,
        )
        super().__init__(tables, states, max_num_seqs=max_num_seqs, max_waiting=max_waiting, align=align)
        #: Since the start: tokens that sequences had at their first admission.
        self.asked_tokens = 0
        #: Since the start: tokens of first admissions that were found in the prefix cache.
        self.found_tokens = 0

    # -- one step

    def schedule(self) -> SchedulerOutput:
        """The next step: one token (and drafts) of every decoding sequence, then prompts, within the free tokens and blocks.

        While there are prompts, drafts have at most half of what the decoding tokens leave of a step. Their blocks are taken
        last, and no sequence is preempted for them. The step has a chunk while `has_work`.
        """
        copies: Copies = []
        preempted: list[TokenSequence] = []
        self._logits_rows = self.max_logits_rows
        self._make_way(preempted)
        running = self._running
        decoding = proposed = 0
        for sequence in running:
            if len(sequence.tokens) - sequence.computed == 1:
                decoding += 1
                if sequence.draft:
                    proposed += sequence.usable_drafts
        budget = self.max_num_batched_tokens - decoding
        draft_budget = min(proposed, budget)
        if draft_budget and (decoding < len(running) or (self._waiting and self._has_place())):
            draft_budget = max(0, min(proposed, budget // 2, budget - self._least_chunk))
        budget -= draft_budget

        decodes: list[TokenSequence] = []
        prompts: list[ScheduledChunk] = []
        index, short = 0, len(preempted)
        # preempted sequences are at the end of the list, so none has a chunk yet
        while index < len(running):
            sequence = running[index]
            index += 1
            if sequence.ahead and len(sequence.tokens) == sequence.limit:
                continue
            start = sequence.computed
            if len(sequence.tokens) - start == 1:
                if start < sequence.reserved or self._secure(sequence, 1, copies, preempted):
                    decodes.append(sequence)
            elif count := self._secure(sequence, budget, copies, preempted):
                prompts.append(self._read(sequence, start, count))
                budget -= count
        if len(preempted) == short:
            self._admit(budget, prompts, copies, preempted)
        if draft_budget:
            chunks = []
            for sequence in decodes:
                drafts = self._secure_drafts(sequence, draft_budget) if sequence.draft else 0
                draft_budget -= drafts
                chunks.append(_chunk(sequence, sequence.computed, 1 + drafts, drafts))
        else:
            chunks = [_chunk(sequence, sequence.computed, 1) for sequence in decodes]
        chunks += prompts
        if self._shares_states:
            for chunk in chunks:
                self._prepare_snapshots(chunk)
        return SchedulerOutput(chunks, copies, preempted, self.states.take_restored() if self._has_states else [])

    def commit(self, chunk: ScheduledChunk, tokens: Iterable[int]) -> None:
        """Record a computed chunk: the accepted draft tokens and one new token, or none where no logits were wanted.

        The last token has no keys yet. Does nothing for an aborted sequence.
        """
        sequence = chunk.sequence
        if sequence.status == "finished":
            return
        made = list(tokens)
        assert not sequence.ahead, "its placeholder is taken back first"
        assert bool(made) == bool(chunk.num_logits), "a chunk gives tokens exactly where logits are wanted"
        assert len(made) <= 1 + chunk.drafts and len(sequence.tokens) + len(made) <= sequence.limit
        computed = chunk.start + chunk.count - chunk.drafts
        if chunk.drafts:
            assert made[:-1] == sequence.draft[: len(made) - 1], "only draft tokens have keys"
            computed += len(made) - 1
            self._tables.trim(sequence, computed)
        if sequence.draft:
            sequence.draft = []
        sequence.tokens += made
        sequence.computed = computed
        self._tables.advance(sequence)
        if sequence.snapshots:
            self.states.advance(sequence)

    # -- the next step, scheduled before the tokens of the one under way are known

    def commit_ahead(self, chunk: ScheduledChunk) -> None:
        """Record a chunk that is being computed, with a placeholder for the token that it gives.

        The next step may then be scheduled: the device changes blocks only after this step. Not for drafts, nor for a sequence
        that shares states, whose next hash would include the placeholder.
        """
        assert not chunk.drafts and not self._shares_states
        sequence = chunk.sequence
        self.commit(chunk, [PLACEHOLDER] if chunk.num_logits else [])
        sequence.ahead = sequence.status != "finished" and chunk.num_logits > 0

    def take_back(self, sequence: TokenSequence) -> None:
        """Take the placeholder back: `commit_token` follows, or the sequence ends."""
        if sequence.ahead:
            sequence.tokens.pop()
            sequence.ahead = False

    def commit_token(self, sequence: TokenSequence, token: int) -> None:
        """Record the token of a chunk that was committed ahead. The sequence may have been preempted since."""
        assert not sequence.ahead and len(sequence.tokens) < sequence.limit
        sequence.tokens.append(token)

    # -- admission

    def _make_way(self, preempted: list[TokenSequence]) -> None:
        """Preempt sequences of a lower priority than the first that waits, as far as it needs their places or blocks."""
        while self._waiting and self._running and self._waiting[0].priority < self._running[-1].priority:
            first = self._waiting[0]
            if self._has_place() and self._fits(first, self._tables.match(first), self._kept_back(self._running)):
                return
            preempted.append(self._preempt())

    def _admit(self, budget: int, prompts: list[ScheduledChunk], copies: Copies, preempted: list[TokenSequence]) -> None:
        """Start waiting sequences, most urgent first, while there are a place, tokens and blocks for the next.

        One that was preempted in this step waits for the next.
        """
        if not self._waiting:
            return
        kept = self._kept_back(self._running)
        while self._waiting and budget and self._has_place():
            sequence = self._waiting[0]
            if sequence in preempted:
                return
            hit = self._tables.match(sequence)
            start = hit * self._tables.block_size
            if self._chunk_end(sequence, start, budget) == start or not self._fits(sequence, hit, kept):
                return
            if is_coming(sequence, hit, self._running, self._tables):
                return
            self._tables.begin(sequence, hit)
            self._start(sequence, hit)
            end = self._chunk_end(sequence, start, min(budget, self._tables.reach(sequence) - start))
            assert end > start, "what fits can begin"
            self._tables.take(sequence, end, copies)
            kept = [sum(blocks) for blocks in zip(kept, self._kept_back([sequence]), strict=True)]
            prompts.append(self._read(sequence, start, end - start))
            budget -= end - start
            if not sequence.admitted:
                sequence.admitted = True
                sequence.cached = start
                self.asked_tokens += len(sequence.tokens)
                self.found_tokens += start

    def _kept_back(self, running: Iterable[TokenSequence]) -> list[int]:
        return kept_back(running, self._tables, self.max_num_batched_tokens)

    def _fits(self, sequence: TokenSequence, hit: int, kept: list[int]) -> bool:
        """Whether a waiting sequence, with `hit` blocks found, fits while the running ones keep back `kept` blocks.

        Alone it always fits: the scheduler refused it otherwise.
        """
        return not self._running or self._tables.fits(sequence, hit, self.max_num_batched_tokens, kept)

    # -- one sequence's part of a step

    def _read(self, sequence: TokenSequence, start: int, count: int) -> ScheduledChunk:
        """A chunk of known tokens. Its rows of logits count against the limit of the step."""
        self._logits_rows -= max(0, start + count - _first_wanted(sequence, start))
        return _chunk(sequence, start, count)

    def _prepare_snapshots(self, chunk: ScheduledChunk) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        known_end = end - chunk.drafts
        findable = self._tables.findable(sequence, end)
        positions = self.states.wanted(sequence, chunk.start, known_end, end, findable)
        if positions:
            self._tables.extend_chain(sequence, min(known_end, findable) // self._tables.block_size)
            self.states.prepare(sequence, positions, known_end)

    def _chunk_end(self, sequence: TokenSequence, start: int, budget: int) -> int:
        """The end of the next chunk from `start`, at most `budget` known tokens long; `start` where no chunk may begin."""
        end = max(start, min(start + budget, len(sequence.tokens)))
        end = min(end, _first_wanted(sequence, start) + self._logits_rows)
        if self._align is None:
            return max(start, before_whole(sequence.images, end)) if sequence.images else end
        if start >= sequence.prompt_length:
            return min(end, start + 1)
        if end >= sequence.prompt_length:
            return sequence.prompt_length
        return max(start, end - end % self._align)

    def _secure(self, sequence: TokenSequence, budget: int, copies: Copies, preempted: list[TokenSequence]) -> int:
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
        drafts = min(sequence.usable_drafts, budget)
        if next_end + drafts > sequence.reserved:
            drafts = min(drafts, self._tables.reach(sequence) - next_end)
            self._tables.take(sequence, next_end + drafts, [])
        return drafts


def _first_wanted(sequence: TokenSequence, start: int) -> int:
    """The first known token from `start` on, in a sequence that wants the logits of all (`logits_from`); else the text's end.

    A last known token that is read alone does not count: it never waits for rows of logits.
    """
    if sequence.logits_from is None or len(sequence.tokens) - start == 1:
        return len(sequence.tokens)
    return max(start, sequence.logits_from)


def _chunk(sequence: TokenSequence, start: int, count: int, drafts: int = 0) -> ScheduledChunk:
    """A chunk; logits are wanted of its last known token and of its drafts, unless more known tokens follow."""
    return ScheduledChunk(sequence, start, count, drafts, 0 if start + count < len(sequence.tokens) else 1 + drafts)
