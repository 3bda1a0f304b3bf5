"""The scheduler under any order of events, with a runner that writes into every page what it would have computed."""

from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from bessemer.core.errors import RequestError
from bessemer.inference.scheduling.block_tables import BlockPool
from bessemer.inference.scheduling.scheduler import BlockGroup, ScheduledChunk, Scheduler, SchedulerOutput
from bessemer.inference.scheduling.sequence import TokenSequence

SIZE = 4


def prefixes(salt: str | None, tokens: list[int]) -> list[int]:
    """A number for the text up to each token: what keys and values at its position depend on."""
    value, values = hash(salt), []
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


class SimulatedRunner:
    """Pages as (text up to the position, piece computed at once, weights) per position; checks all that a query reads."""

    def __init__(self, groups: list[BlockGroup], align: int | None, exact: bool) -> None:
        self.groups, self.align, self.exact = groups, align, exact
        self.pages = [[[None] * SIZE for _ in range(pool.total)] for pool, _ in groups]
        # (text up to its end, weights) of each slot and each snapshot
        self.states: dict[int, tuple[int, int]] = {}
        self.snapshots: dict[int, tuple[int, int]] = {}
        self.weights = 0

    def run(self, output: SchedulerOutput, oldest_weights: dict[TokenSequence, int]) -> None:
        for group, source, target in output.copies:
            self.pages[group][target] = list(self.pages[group][source])
        for number, slot in output.restored:
            self.states[slot] = self.snapshots[number]
        for chunk in output.chunks:
            if chunk.sequence.state_slot is not None:
                self._read_states(chunk, oldest_weights[chunk.sequence])
        written = [self._write(group, chunk) for chunk in output.chunks for group in range(len(self.groups))]
        positions = [place for places in written for place in places]
        assert len(positions) == len(set(positions)), "two chunks of one step write one place"
        for chunk in output.chunks:
            for group in range(len(self.groups)):
                self._read(group, chunk, oldest_weights[chunk.sequence])

    def _read_states(self, chunk: ScheduledChunk, oldest_weights: int) -> None:
        sequence = chunk.sequence
        texts = prefixes(sequence.salt, sequence.tokens + sequence.draft)
        if chunk.start:
            text, weights = self.states[sequence.state_slot]
            assert text == texts[chunk.start - 1], "a state is that of another text"
            assert weights >= oldest_weights, "a state was computed by weights that are no more"
        for position, number in sequence.snapshots.items():
            assert chunk.start < position <= chunk.start + chunk.count and position % SIZE == 0
            if self.exact:
                assert position % self.align == 0 and position <= sequence.prompt_length
            self.snapshots[number] = (texts[position - 1], self.weights)

    def came_to(self, sequence: TokenSequence) -> None:
        """The state in its slot is that after all it has computed."""
        if sequence.state_slot is not None:
            text = prefixes(sequence.salt, sequence.tokens)[sequence.computed - 1]
            self.states[sequence.state_slot] = (text, self.weights)

    def _write(self, group: int, chunk: ScheduledChunk) -> list[tuple[int, int, int]]:
        sequence, pool = chunk.sequence, self.groups[group].pool
        texts = prefixes(sequence.salt, sequence.tokens + sequence.draft)
        places = []
        for position in range(chunk.start, chunk.start + chunk.count):
            block = sequence.tables[group][position // SIZE]
            assert pool.references[block] == 1, "a block that is written is shared"
            assert not pool.is_sealed(block), "a block that is written is found by its text"
            self.pages[group][block][position % SIZE] = (texts[position], self._piece(chunk, position), self.weights)
            places.append((group, block, position % SIZE))
        return places

    def _piece(self, chunk: ScheduledChunk, position: int) -> tuple[int, int] | None:
        """The positions that are computed in one matrix: a runner cuts chunks at multiples of `align`, drafts are single."""
        if self.align is None:
            return None
        if chunk.count - chunk.drafts == 1:
            return position, position + 1
        first = position - position % self.align
        return max(chunk.start, first), min(chunk.start + chunk.count, first + self.align)

    def piece_alone(self, sequence: TokenSequence, position: int) -> tuple[int, int]:
        if position >= sequence.prompt_length:
            return position, position + 1
        first = position - position % self.align
        return first, min(first + self.align, sequence.prompt_length)

    def _read(self, group: int, chunk: ScheduledChunk, oldest_weights: int) -> None:
        sequence, window = chunk.sequence, self.groups[group].window
        texts = prefixes(sequence.salt, sequence.tokens + sequence.draft)
        first = 0 if window is None else max(0, chunk.start - window + 1)
        for position in range(first, chunk.start + chunk.count):
            block = sequence.tables[group][position // SIZE]
            assert block >= 0, "a block that a query sees was freed"
            text, piece, weights = self.pages[group][block][position % SIZE]
            assert text == texts[position], "a block holds another text"
            assert weights >= oldest_weights, "a block was computed by weights that are no more"
            if self.exact:
                assert piece == self.piece_alone(sequence, position), "a key was computed in another piece than alone"


def rows_of(chunk: ScheduledChunk) -> int:
    """Tokens of a chunk that are read and whose logits their sequence wants; the next token's chunk is bounded otherwise."""
    if chunk.sequence.logits_from is None or chunk.count - chunk.drafts == 1:
        return 0
    return max(0, chunk.start + chunk.count - max(chunk.start, chunk.sequence.logits_from))


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(6, 24),
        windows=st.sampled_from([(None,), (None, 6), (5,), (1, None), (None, 3, 9), (None,), (None, 13), ()]),
        max_num_seqs=st.sampled_from([1, 3, 4, 6]),
        extra_tokens=st.integers(0, 20),
        max_waiting=st.sampled_from([None, 0, 3]),
        align=st.sampled_from([None, None, None, 2, 6, 8]),
        share_generated=st.booleans(),
        slots=st.sampled_from([0, 0, 0, 2, 3, 6]),
        snapshots=st.sampled_from([0, 1, 3, 9, 30]),
        extra_rows=st.integers(0, 9),
    )
    def begin(
        self, blocks, windows, max_num_seqs, extra_tokens, max_waiting, align, share_generated, slots, snapshots, extra_rows
    ):
        # the groups are of different sizes, so that any of them may be the one that runs out
        groups = [BlockGroup(BlockPool(blocks + 3 * (index % 2), SIZE), window) for index, window in enumerate(windows)]
        self.scheduler = Scheduler(
            groups,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs - 1 + (align or 1) + extra_tokens,
            max_logits_rows=(align or 1) + extra_rows,
            max_waiting=max_waiting,
            state_slots=slots,
            snapshots=snapshots if slots else 0,
            block_size=SIZE,
            align=align,
            share_generated=share_generated,
        )
        self.groups, self.align, self.slots = groups, align, slots
        self.runner = SimulatedRunner(groups, align, exact=align is not None and not share_generated)
        self.live: list[TokenSequence] = []
        self.oldest_weights: dict[TokenSequence, int] = {}
        self.output: SchedulerOutput | None = None
        self.chains: dict[bytes, list[int]] = {}
        self.made = 0

    # -- events

    @rule(
        length=st.integers(1, 40),
        answer=st.sampled_from([1, 5, 15, 24]),
        likeness=st.integers(0, 40),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([None, None, None, "adapter"]),
        logits_from=st.sampled_from([None, None, None, 0, 5]),
    )
    def add(self, length, answer, likeness, priority, salt, logits_from):
        # prompts agree up to their likeness, then each goes on by itself
        self.made += 1
        tokens = [position if position < likeness else 1000 * self.made for position in range(length)]
        sequence = TokenSequence(self.made, tokens, length, length + answer, priority, salt, logits_from)
        try:
            self.scheduler.enqueue(sequence)
        except RequestError:
            assert sequence.order == (0, 0, 0)
            return
        self.live.append(sequence)

    @precondition(lambda self: self.output is None)
    @rule(seed=st.integers(0, 2**32))
    def schedule(self, seed):
        self._schedule(Random(seed))

    @precondition(lambda self: self.output is not None)
    @rule(seed=st.integers(0, 2**32))
    def commit(self, seed):
        self._commit(Random(seed))

    @precondition(lambda self: self.output is None)
    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 8))
    def go_on(self, seed, steps):
        for _ in range(steps):
            self._schedule(Random(seed))
            self._commit(Random(seed))

    def _schedule(self, random):
        for sequence in self.live:
            if random.random() < 0.5:
                sequence.draft = [random.randrange(3) for _ in range(random.randrange(6))]
        running = {sequence for sequence in self.live if sequence.status == "running"}
        texts = {sequence: list(sequence.tokens) for sequence in self.live}
        output = self.output = self.scheduler.schedule()
        assert bool(output.chunks) == bool(self.live), "a step computes something while there is work"
        assert sum(chunk.count for chunk in output.chunks) <= self.scheduler.max_num_batched_tokens
        assert sum(map(rows_of, output.chunks)) <= self.scheduler.max_logits_rows
        assert len({chunk.sequence for chunk in output.chunks}) == len(output.chunks)
        assert not {chunk.sequence for chunk in output.chunks} & set(output.preempted)
        for sequence in output.preempted:
            assert (sequence.status, sequence.tokens, sequence.tables) == ("waiting", texts[sequence], [])
        for chunk in output.chunks:
            if chunk.sequence not in running:
                self.oldest_weights[chunk.sequence] = self.runner.weights
                assert chunk.sequence.logits_from is None or chunk.start <= chunk.sequence.logits_from
            assert chunk.start == chunk.sequence.computed
            end = chunk.start + chunk.count - chunk.drafts
            if self.align and chunk.start < chunk.sequence.prompt_length:
                assert end % self.align == 0 or end == chunk.sequence.prompt_length
        self.runner.run(output, self.oldest_weights)

    def _commit(self, random):
        output, self.output = self.output, None
        for chunk in output.chunks:
            sequence = chunk.sequence
            made = []
            if sequence.status == "running" and chunk.num_logits:
                assert chunk.num_logits == 1 + chunk.drafts
                made = [*sequence.draft[: random.randint(0, chunk.drafts)], random.randrange(3)]
            self.scheduler.commit(chunk, made)
            if sequence.status == "running":
                self.runner.came_to(sequence)
            if sequence.status == "running" and len(sequence.tokens) == sequence.limit:
                self.scheduler.finish(sequence)
                self.live.remove(sequence)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 100))
    def abort(self, number):
        self._end(self.live[number % len(self.live)], self.scheduler.abort)

    @precondition(lambda self: self.output is None and any(sequence.status == "running" for sequence in self.live))
    @rule(number=st.integers(0, 100))
    def finish(self, number):
        running = [sequence for sequence in self.live if sequence.status == "running"]
        self._end(running[number % len(running)], self.scheduler.finish)

    @precondition(lambda self: self.output is None and any(sequence.status == "running" for sequence in self.live))
    @rule(number=st.integers(0, 100), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3))
    def finish_with_successors(self, number, lengths):
        running = [sequence for sequence in self.live if sequence.status == "running"]
        sequence = running[number % len(running)]
        prompt = sequence.tokens[: sequence.prompt_length]
        successors = []
        for length in lengths:
            self.made += 1
            tokens = [*prompt, *[1000 * self.made] * length][: sequence.limit - 1]
            successors.append(
                TokenSequence(
                    self.made, tokens, len(prompt), len(tokens) + 1, sequence.priority, sequence.salt, logits_from=len(prompt)
                )
            )
        self.scheduler.finish(sequence, successors)
        for successor in successors:
            if successor.status == "running":
                self.oldest_weights[successor] = self.oldest_weights[sequence]
        self.live.remove(sequence)
        self.live += successors

    def _end(self, sequence, end):
        held = [[block for block in table if block >= 0] for table in sequence.tables]
        counts = [pool.references.copy() for pool, _ in self.groups]
        end(sequence)
        for (pool, _), blocks, before in zip(self.groups, held, counts, strict=False):
            assert all(pool.references[block] == before[block] - 1 for block in blocks)
        self.live.remove(sequence)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 100), beam=st.booleans(), children=st.integers(1, 3))
    def fork(self, number, beam, children):
        # rather one that has something to share
        parents = [sequence for sequence in self.live if sequence.computed] or self.live
        for _ in range(children):
            self._fork(parents[number % len(parents)], beam)

    def _fork(self, parent, beam):
        tokens = parent.tokens[: parent.prompt_length]
        if beam and len(parent.tokens) > parent.prompt_length:
            tokens = [*parent.tokens[:-1], 5]
        self.made += 1
        child = TokenSequence(self.made, tokens, parent.prompt_length, parent.limit, parent.priority, parent.salt)
        self.scheduler.fork(parent, child)
        if child.status == "running":
            self.oldest_weights[child] = self.oldest_weights[parent]
        self.live.append(child)

    @rule(really=st.sampled_from([False, False, False, True]))
    def change_weights(self, really):
        # seldom, or there would be little to find
        if really:
            self.runner.weights += 1
            self.scheduler.forget()

    # -- what always holds

    @invariant()
    def counts_are_those_of_the_tables(self):
        for group, (pool, _) in enumerate(self.groups):
            counts = [0] * pool.total
            for sequence in self.live:
                for block in sequence.tables[group] if sequence.tables else []:
                    if block >= 0:
                        counts[block] += 1
            assert pool.references == counts
            assert pool.free == sum(count == 0 for count in counts)
        assert self.scheduler.running == sum(sequence.status == "running" for sequence in self.live)
        assert self.scheduler.waiting == sum(sequence.status == "waiting" for sequence in self.live)

    @invariant()
    def blocks_are_found_only_by_the_text_they_hold(self):
        for sequence in self.live:
            texts = prefixes(sequence.salt, sequence.tokens)
            for block, key in enumerate(sequence.chain[1:]):
                self.chains[key] = texts[block * SIZE : (block + 1) * SIZE]
        for group, (pool, _) in enumerate(self.groups):
            for key, texts in self.chains.items():
                block = pool.find(key)
                assert block is None or [text for text, _, _ in self.runner.pages[group][block]] == texts
        for key, texts in self.chains.items():
            number = self.scheduler.states.pool.find(key)
            assert number is None or self.runner.snapshots[number][0] == texts[-1]

    @invariant()
    def states_are_of_one_sequence_each(self):
        held = [sequence.state_slot for sequence in self.live if sequence.state_slot is not None]
        assert len(held) == len(set(held)) == (self.scheduler.running if self.slots else 0)

    @invariant()
    def snapshots_that_nobody_writes_are_free(self):
        pool = self.scheduler.states.pool
        written = [number for sequence in self.live for number in sequence.snapshots.values()]
        assert len(written) == len(set(written)) == pool.total - pool.free
        assert self.output is not None or not written

    @invariant()
    def windows_hold_no_more_than_they_see(self):
        if self.output is None:
            for sequence in self.live:
                for (_, window), table in zip(self.groups, sequence.tables, strict=False):
                    if window is not None:
                        seen = max(0, sequence.computed - window + 1)
                        assert [block >= 0 for block in table] == [(index + 1) * SIZE > seen for index in range(len(table))]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        random = Random(self.made)
        if self.output is not None:
            self._commit(random)
        steps = 0
        while self.scheduler.has_work:
            self._schedule(random)
            self._commit(random)
            self.counts_are_those_of_the_tables()
            steps += 1
            assert steps < 10_000, "some sequence never ends"
        assert not self.live
        states = self.scheduler.states
        assert states.pool.free == states.pool.total
        assert not self.slots or len({states._slots[index] for index in range(self.slots)}) == self.slots
        for pool, _ in self.groups:
            assert pool.free == pool.total
            assert not any(pool.references)


def test_pages_counts_contents_and_progress_hold_under_any_order_of_events():
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
        ),
    )
