import sys

import pytest

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.scheduling.block_tables import BlockPool, root_hash
from bessemer.inference.scheduling.scheduler import BlockGroup, Scheduler, SchedulerOutput
from bessemer.inference.scheduling.sequence import TokenSequence

SIZE = 4


def scheduler_of(*blocks: int, windows: tuple[int | None, ...] = (None,), **settings) -> Scheduler:
    groups = [BlockGroup(BlockPool(count, SIZE), window) for count, window in zip(blocks, windows, strict=True)]
    return Scheduler(groups, **({"max_num_seqs": 8, "max_num_batched_tokens": 64} | settings))


def sequence_of(prompt: int | list[int], answer: int = 8, identity: int = 0, **settings) -> TokenSequence:
    """A prompt of so many tokens, all its own, and room for an answer."""
    tokens = [1000 * identity + index for index in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return TokenSequence(identity, tokens, len(tokens), len(tokens) + answer, **settings)


def step(scheduler: Scheduler, accepted: int = 0) -> SchedulerOutput:
    """One step in which so many drafts are accepted; sequences at their limit finish. The new token is 7."""
    output = scheduler.schedule()
    for chunk in output.chunks:
        made = [*chunk.sequence.draft[: min(accepted, chunk.drafts)], 7] if chunk.num_logits else []
        scheduler.commit(chunk, made)
        if len(chunk.sequence.tokens) == chunk.sequence.limit:
            scheduler.finish(chunk.sequence)
    return output


def run(scheduler: Scheduler, *sequences: TokenSequence) -> None:
    for sequence in sequences:
        scheduler.enqueue(sequence)
    while scheduler.has_work:
        assert step(scheduler).chunks


def shape(output: SchedulerOutput) -> list[tuple[int, int, int, int]]:
    return [(chunk.sequence.identity, chunk.start, chunk.count, chunk.drafts) for chunk in output.chunks]


def test_a_prompt_is_computed_whole_and_then_one_token_after_the_other():
    scheduler = scheduler_of(8)
    scheduler.enqueue(sequence_of(5, answer=3))
    assert shape(step(scheduler)) == [(0, 0, 5, 0)]
    assert shape(step(scheduler)) == [(0, 5, 1, 0)]
    assert shape(step(scheduler)) == [(0, 6, 1, 0)]
    assert not scheduler.has_work
    assert scheduler.groups[0].pool.free == 8


def test_a_long_prompt_is_computed_in_chunks_beside_those_that_decode():
    scheduler = scheduler_of(32, max_num_seqs=2, max_num_batched_tokens=6)
    scheduler.enqueue(sequence_of(3, identity=1))
    step(scheduler)
    scheduler.enqueue(sequence_of(12, identity=2))
    output = scheduler.schedule()
    assert shape(output) == [(1, 3, 1, 0), (2, 0, 5, 0)]
    assert [chunk.num_logits for chunk in output.chunks] == [1, 0]
    for chunk, made in zip(output.chunks, ([7], []), strict=True):
        scheduler.commit(chunk, made)
    assert shape(step(scheduler)) == [(1, 4, 1, 0), (2, 5, 5, 0)]
    assert shape(step(scheduler)) == [(1, 5, 1, 0), (2, 10, 2, 0)]


def test_accepted_drafts_and_one_more_token_are_kept_and_the_rest_of_their_blocks_given_back():
    scheduler = scheduler_of(8)
    sequence = sequence_of(4, answer=20)
    scheduler.enqueue(sequence)
    step(scheduler)
    sequence.draft = [11, 12, 13, 14, 15, 16]
    output = scheduler.schedule()
    assert shape(output) == [(0, 4, 7, 6)]
    assert output.chunks[0].num_logits == 7
    assert len(sequence.tables[0]) == 3
    scheduler.commit(output.chunks[0], [11, 12, 9])
    assert sequence.tokens[4:] == [7, 11, 12, 9]
    assert (sequence.computed, sequence.draft, len(sequence.tables[0])) == (7, [], 2)


def test_a_second_request_finds_the_blocks_of_the_first():
    scheduler = scheduler_of(16)
    run(scheduler, sequence_of(10, answer=4))
    again = sequence_of(10)
    scheduler.enqueue(again)
    assert shape(step(scheduler)) == [(0, 8, 2, 0)]
    assert again.cached == 8
    assert (scheduler.asked_tokens, scheduler.found_tokens, scheduler.groups[0].pool.hits) == (20, 8, 2)


def test_a_prompt_found_whole_still_computes_its_last_block():
    scheduler = scheduler_of(16)
    run(scheduler, sequence_of(8, answer=4))
    scheduler.enqueue(sequence_of(8))
    assert shape(step(scheduler)) == [(0, 4, 4, 0)]


def test_the_least_urgent_is_preempted_keeps_its_tokens_and_its_place_in_the_queue():
    scheduler = scheduler_of(6)
    first, second = sequence_of(8, answer=12, identity=1), sequence_of(8, answer=12, identity=2)
    scheduler.enqueue(first)
    scheduler.enqueue(second)
    while not (output := step(scheduler)).preempted:
        pass
    assert output.preempted == [second]
    assert (second.status, second.computed, second.tables) == ("waiting", 0, [])
    made = second.tokens[8:]
    assert len(made) > 1
    late = sequence_of(4, identity=3)
    scheduler.enqueue(late)
    while second.status == "waiting":
        assert late.status == "waiting"
        step(scheduler)
    assert second.tokens[8 : 8 + len(made)] == made
    # what it found of its own is no hit of its request
    assert (second.cached, scheduler.preemptions, scheduler.asked_tokens) == (0, 1, 8 + 8 + 4)


def test_what_could_never_fit_is_refused():
    scheduler = scheduler_of(4)
    scheduler.enqueue(sequence_of(9, answer=8))  # 16 tokens have keys
    with pytest.raises(RequestError, match="may come to 18 tokens and the memory for keys and values holds 17;"):
        scheduler.enqueue(sequence_of(9, answer=9))


def test_the_queue_has_a_limit_beyond_the_empty_places():
    scheduler = scheduler_of(64, max_num_seqs=2, max_waiting=1)
    for identity in range(3):
        scheduler.enqueue(sequence_of(4, identity=identity))
    with pytest.raises(RequestError, match="3 requests wait already and max_waiting is 1; try again later"):
        scheduler.enqueue(sequence_of(4))
    step(scheduler)
    with pytest.raises(RequestError, match="1 requests wait"):
        scheduler.enqueue(sequence_of(4))


def test_a_step_too_small_for_what_runs_is_refused():
    with pytest.raises(ConfigError, match="raise max_num_batched_tokens to at least 8"):
        scheduler_of(4, max_num_seqs=8, max_num_batched_tokens=7)
    with pytest.raises(ConfigError, match="at least 71"):
        scheduler_of(4, max_num_seqs=8, align=64)


def test_an_aborted_sequence_frees_its_pages_at_once_and_its_work_is_left_out():
    scheduler = scheduler_of(8)
    sequence = sequence_of(5)
    scheduler.enqueue(sequence)
    output = scheduler.schedule()
    scheduler.abort(sequence)
    assert scheduler.groups[0].pool.free == 8
    scheduler.commit(output.chunks[0], [7])
    assert len(sequence.tokens) == 5
    scheduler.abort(sequence)
    assert not scheduler.has_work


def test_a_fork_shares_the_prompt_and_copies_the_block_that_it_writes():
    scheduler = scheduler_of(16)
    parent, child = sequence_of(7, identity=1), sequence_of(7, identity=2)
    child.tokens = list(parent.tokens)
    scheduler.enqueue(parent)
    step(scheduler)
    scheduler.fork(parent, child)
    assert child.computed == 6
    assert child.tables == parent.tables
    shared = parent.tables[0][1]
    output = scheduler.schedule()
    assert shape(output) == [(1, 7, 1, 0), (2, 6, 1, 0)]
    assert output.copies == [(0, shared, parent.tables[0][1])]
    assert child.tables[0][1] == shared
    assert parent.tables[0][0] == child.tables[0][0]


@pytest.mark.parametrize(("text", "computed"), [(6, 4), (7, 6), (8, 6)])
def test_a_fork_computes_the_last_piece_of_a_prompt_whole_and_none_behind_the_prompt(text, computed):
    scheduler = scheduler_of(16, align=4)
    parent, child = sequence_of(6, identity=1), sequence_of(6, identity=2)
    scheduler.enqueue(parent)
    step(scheduler)
    child.tokens = [*parent.tokens, 8, 9][:text]
    scheduler.fork(parent, child)
    assert (parent.computed, child.computed) == (6, computed)


def test_where_no_block_is_left_for_the_copy_the_fork_gives_way():
    scheduler = scheduler_of(3)
    parent, child = sequence_of(7, answer=2, identity=1), sequence_of(7, answer=2, identity=2)
    child.tokens = list(parent.tokens)
    scheduler.enqueue(parent)
    step(scheduler)
    scheduler.fork(parent, child)
    scheduler.groups[0].pool.allocate()
    output = scheduler.schedule()
    assert (shape(output), output.preempted, output.copies) == ([(1, 7, 1, 0)], [child], [])


def test_a_windowed_group_frees_blocks_that_no_query_sees():
    scheduler = scheduler_of(16, 16, windows=(None, 5), share_prefixes=False)
    sequence = sequence_of(4, answer=20)
    scheduler.enqueue(sequence)
    while sequence.computed < 12:
        step(scheduler)
    # the query at 12 sees keys 8 to 12
    assert sequence.tables[1][:2] == [-1, -1]
    assert scheduler.groups[1].pool.free == 15
    assert -1 not in sequence.tables[0]


def test_every_running_sequence_has_a_state_of_its_own():
    scheduler = scheduler_of(64, state_slots=2)
    sequences = [sequence_of(4, identity=identity) for identity in range(3)]
    for sequence in sequences:
        scheduler.enqueue(sequence)
    step(scheduler)
    assert {sequence.state_slot for sequence in sequences[:2]} == {0, 1}
    assert (sequences[2].state_slot, scheduler.waiting) == (None, 1)
    scheduler.finish(sequences[0])
    step(scheduler)
    assert sequences[2].state_slot is not None


def test_of_two_that_come_together_the_second_waits_for_the_beginning_that_the_first_computes():
    scheduler = scheduler_of(64)
    first, second, other = (sequence_of([*range(20), identity], identity=identity) for identity in (1, 2, 3))
    other.tokens[:16] = range(100, 116)
    for sequence in (first, second):
        scheduler.enqueue(sequence)
    assert shape(step(scheduler)) == [(1, 0, 21, 0)]
    scheduler.enqueue(other)
    assert shape(step(scheduler)) == [(1, 21, 1, 0), (2, 20, 1, 0), (3, 0, 21, 0)]


def test_none_waits_for_what_will_not_be_found():
    # the prompt's end cuts the only piece short
    scheduler = scheduler_of(64, align=16, share_generated=False)
    scheduler.enqueue(sequence_of(15))
    scheduler.enqueue(sequence_of(15))
    assert len(step(scheduler).chunks) == 2


def test_none_waits_for_what_was_computed_and_is_found_no_more():
    scheduler = scheduler_of(64, 32, windows=(None, 5), max_num_batched_tokens=26)
    scheduler.enqueue(sequence_of(38, identity=1))
    step(scheduler)
    late = sequence_of([*range(1000, 1020), 1, 2], identity=2)
    scheduler.enqueue(late)
    pool = scheduler.groups[1].pool
    for block in [pool.allocate() for _ in range(pool.free)]:
        pool.release(block)
    assert shape(step(scheduler)) == [(1, 26, 12, 0), (2, 0, 14, 0)]


def test_none_waits_for_one_whose_prompt_lacks_a_single_token():
    scheduler = scheduler_of(64, max_num_batched_tokens=7, max_num_seqs=2)
    scheduler.enqueue(sequence_of([*range(8)], identity=1))
    assert shape(step(scheduler)) == [(1, 0, 7, 0)]
    # its last token fills the block that both share
    scheduler.enqueue(sequence_of([*range(8), *range(50, 54)], identity=2))
    assert shape(step(scheduler)) == [(1, 7, 1, 0), (2, 4, 6, 0)]


def test_none_waits_for_a_beginning_shorter_than_what_it_computes_itself():
    scheduler = scheduler_of(64)
    scheduler.enqueue(sequence_of([*range(8), *range(50, 62)], identity=1))
    scheduler.enqueue(sequence_of([*range(8), *range(80, 92)], identity=2))
    assert shape(step(scheduler)) == [(1, 0, 20, 0), (2, 0, 20, 0)]


def test_one_whose_beginning_is_found_waits_for_half_of_what_it_still_lacks():
    scheduler = scheduler_of(64)
    run(scheduler, sequence_of(8, answer=1))
    scheduler.enqueue(sequence_of([*range(28)], identity=1))
    # 8 tokens are found, and of the 15 that it lacks the first computes 8
    scheduler.enqueue(sequence_of([*range(16), *range(50, 57)], identity=2))
    assert shape(step(scheduler)) == [(1, 8, 20, 0)]
    assert shape(step(scheduler)) == [(1, 28, 1, 0), (2, 16, 7, 0)]


@pytest.mark.parametrize(("lacks", "waits"), [(16, True), (17, False)])
def test_exactly_half_of_what_is_lacking_is_waited_for(lacks, waits):
    scheduler = scheduler_of(64)
    run(scheduler, sequence_of(8, answer=1))
    scheduler.enqueue(sequence_of([*range(28)], identity=1))
    scheduler.enqueue(sequence_of([*range(16), *range(50, 42 + lacks)], identity=2))
    assert len(step(scheduler).chunks) == (1 if waits else 2)


@pytest.mark.parametrize(("common", "waits"), [(4, True), (3, False)])
def test_a_single_block_is_waited_for_too_and_a_part_of_one_never(common, waits):
    scheduler = scheduler_of(64)
    for identity in (1, 2):
        scheduler.enqueue(sequence_of([*range(common), *[90 + identity] * (7 - common)], identity=identity))
    assert len(step(scheduler).chunks) == (1 if waits else 2)


def test_a_step_ahead_has_a_placeholder_only_where_a_token_is_coming():
    scheduler = scheduler_of(8, max_num_seqs=1, max_num_batched_tokens=4)
    sequence = sequence_of(6, answer=2)
    scheduler.enqueue(sequence)
    (chunk,) = scheduler.schedule().chunks
    scheduler.commit_ahead(chunk)
    assert (sequence.ahead, len(sequence.tokens), sequence.computed) == (False, 6, 4)
    scheduler.take_back(sequence)
    assert len(sequence.tokens) == 6
    (chunk,) = scheduler.schedule().chunks
    scheduler.commit_ahead(chunk)
    assert (sequence.ahead, sequence.tokens[6:], sequence.computed) == (True, [0], 6)
    # the next step reads the token that is coming
    (ahead,) = scheduler.schedule().chunks
    assert (ahead.start, ahead.count, ahead.num_logits) == (6, 1, 1)
    scheduler.take_back(sequence)
    scheduler.commit_token(sequence, 7)
    assert (sequence.ahead, sequence.tokens[6:]) == (False, [7])
    scheduler.commit_ahead(ahead)
    # its last token is coming: there is nothing to compute behind it
    assert sequence.ahead and len(sequence.tokens) == sequence.limit
    assert scheduler.schedule().chunks == []
    scheduler.take_back(sequence)
    scheduler.commit_token(sequence, 8)
    scheduler.finish(sequence)
    assert sequence.tokens[6:] == [7, 8] and not scheduler.has_work


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # nobody can begin, so that drafts have what there is
        ({"max_num_seqs": 1, "max_num_batched_tokens": 11}, [(1, 4, 11, 10)]),
        # a prompt's least chunk goes before drafts
        ({"max_num_seqs": 2, "max_num_batched_tokens": 6, "align": 4}, [(1, 4, 2, 1), (2, 0, 4, 0)]),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 5, "align": 4}, [(1, 4, 1, 0), (2, 0, 4, 0)]),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 12, "least_chunk": 8}, [(1, 4, 4, 3), (2, 0, 8, 0)]),
    ],
)
def test_drafts_beside_a_prompt_that_waits(settings, expected):
    scheduler = scheduler_of(64, **settings)
    first = sequence_of(4, answer=60, identity=1)
    scheduler.enqueue(first)
    step(scheduler)
    scheduler.enqueue(sequence_of(30, identity=2))
    first.draft = [1] * 20
    assert shape(scheduler.schedule()) == expected


def test_the_longest_sequence_that_the_memory_holds_is_told_for_any_context():
    scheduler = scheduler_of(4)
    assert [scheduler.longest(most) for most in (1, 10, 17, 18, 10**30)] == [1, 10, 17, 17, 17]
    scheduler.check(17)
    with pytest.raises(RequestError):
        scheduler.check(18)
    assert scheduler_of(3, windows=(8,)).longest(10**30) == sys.maxsize - 1


def test_a_preempted_sequence_waits_at_its_place_and_a_shifted_one_is_shorter():
    scheduler = scheduler_of(64)
    first, second = sequence_of(6, identity=1), sequence_of(6, identity=2, overflow=9, keep=2)
    for sequence in (first, second):
        scheduler.enqueue(sequence)
    step(scheduler)
    first.draft = [1]
    scheduler.preempt(first)
    assert (first.status, first.draft, scheduler.running, scheduler.waiting, scheduler.preemptions) == ("waiting", [], 1, 1, 1)
    scheduler.shift(second)
    assert (second.status, second.shifts, scheduler.waiting, scheduler.preemptions) == ("waiting", 1, 2, 1)
    scheduler.shift(second)
    assert (second.shifts, scheduler.waiting) == (2, 2)
    assert [chunk.sequence for chunk in step(scheduler).chunks] == [first, second]
    scheduler.preempt_all()
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (0, 2, 3)


def test_a_fork_that_finds_no_place_waits_and_finds_its_parents_blocks():
    scheduler = scheduler_of(64, max_num_seqs=1)
    parent, child, late = sequence_of(10, identity=1), sequence_of(10, identity=2), sequence_of(10, identity=3)
    child.tokens = list(parent.tokens)
    scheduler.enqueue(parent)
    step(scheduler)
    scheduler.enqueue(late)
    scheduler.fork(parent, child)
    assert (child.status, scheduler.waiting) == ("waiting", 2)
    scheduler.finish(parent)
    # before the one that came later than its parent
    assert shape(step(scheduler)) == [(2, 8, 2, 0)]


def test_successors_share_the_prompt_of_one_that_has_ended_and_the_first_has_its_place():
    scheduler = scheduler_of(64, max_num_seqs=2)
    first, other = sequence_of(10, answer=1, identity=1), sequence_of(3, identity=9)
    scheduler.enqueue(first)
    scheduler.enqueue(other)
    for chunk in scheduler.schedule().chunks:
        scheduler.commit(chunk, [7])
    heirs = [TokenSequence(identity, [*first.tokens[:10], 4, 5, 6], 10, 14) for identity in (2, 3)]
    held = scheduler.groups[0].pool.free
    scheduler.finish(first, heirs)
    assert [(heir.status, heir.computed) for heir in heirs] == [("running", 10), ("waiting", 0)]
    assert scheduler.groups[0].pool.free == held
    output = scheduler.schedule()
    # nobody else has the block, half of which the prompt fills
    assert (shape(output), output.copies) == ([(9, 3, 1, 0), (2, 10, 3, 0)], [])


def test_sequences_that_want_all_logits_share_the_rows_of_a_step():
    scheduler = scheduler_of(64, max_logits_rows=6)
    for identity in (1, 2):
        scheduler.enqueue(sequence_of(13, answer=1, identity=identity, logits_from=4))
    scheduler.enqueue(sequence_of(20, identity=3))
    # 4 tokens of whose logits none is wanted, and 6 of the rows; then none is left for the second
    assert shape(step(scheduler)) == [(1, 0, 10, 0), (2, 0, 4, 0), (3, 0, 20, 0)]
    assert shape(step(scheduler)) == [(3, 20, 1, 0), (1, 10, 3, 0), (2, 4, 3, 0)]
    assert shape(step(scheduler)) == [(3, 21, 1, 0), (2, 7, 6, 0)]


def test_a_fork_is_not_refused_by_a_full_queue():
    scheduler = scheduler_of(64, max_num_seqs=1, max_waiting=0)
    parent = sequence_of(6)
    scheduler.enqueue(parent)
    scheduler.fork(parent, sequence_of(6))
    assert scheduler.waiting == 2


def test_a_beam_shares_all_but_the_token_that_differs():
    scheduler = scheduler_of(64)
    parent = sequence_of(6, identity=1)
    scheduler.enqueue(parent)
    for _ in range(4):
        step(scheduler)
    beam = TokenSequence(2, [*parent.tokens[:-1], 5], 6, parent.limit)
    scheduler.fork(parent, beam)
    scheduler.finish(parent)
    output = step(scheduler)
    assert (shape(output), output.copies) == ([(2, 9, 1, 0)], [])


def test_a_fork_waits_where_its_parents_window_has_left_the_prompt():
    scheduler = scheduler_of(64, windows=(4,))
    parent = sequence_of(8, answer=40, identity=1)
    scheduler.enqueue(parent)
    while parent.computed < 20:
        step(scheduler)
    child = sequence_of(8, identity=2)
    child.tokens = parent.tokens[:8]
    scheduler.fork(parent, child)
    assert child.status == "waiting"


def test_a_hit_in_a_windowed_group_needs_only_the_blocks_that_the_window_sees():
    scheduler = scheduler_of(64, 8, windows=(None, 5))
    run(scheduler, sequence_of(32, answer=2))
    pool = scheduler.groups[1].pool
    # what was freed first is given out first
    taken = [pool.allocate() for _ in range(5)]
    again = sequence_of(32)
    scheduler.enqueue(again)
    assert shape(scheduler.schedule()) == [(0, 28, 4, 0)]
    assert again.tables[1][:6] == [-1] * 6
    assert not set(taken) & set(again.tables[1])


def test_what_follows_a_hit_is_read_as_far_as_the_blocks_of_a_window_reach():
    scheduler = scheduler_of(64, 8, windows=(None, 5))
    run(scheduler, sequence_of(32, answer=2))
    scheduler.enqueue(sequence_of(92))
    assert [shape(step(scheduler)) for _ in range(3)] == [[(0, 32, 28, 0)], [(0, 60, 28, 0)], [(0, 88, 4, 0)]]


def test_a_more_urgent_request_takes_the_place_of_a_less_urgent_one():
    scheduler = scheduler_of(64, max_num_seqs=1)
    patient, urgent = sequence_of(6, identity=1, priority=1), sequence_of(6, identity=2)
    scheduler.enqueue(patient)
    step(scheduler)
    scheduler.enqueue(urgent)
    output = step(scheduler)
    assert output.preempted == [patient]
    assert shape(output) == [(2, 0, 6, 0)]
    while urgent.status == "running":
        step(scheduler)
    step(scheduler)
    assert patient.status == "running"


def test_none_may_begin_where_none_waits_or_all_places_are_taken_by_equals():
    scheduler = scheduler_of(16, max_num_seqs=1)
    assert not scheduler.may_admit
    scheduler.enqueue(sequence_of(4, identity=1))
    assert scheduler.may_admit
    step(scheduler)
    assert not scheduler.may_admit
    scheduler.enqueue(sequence_of(4, identity=2))
    assert not scheduler.may_admit
    scheduler.enqueue(sequence_of(4, identity=3, priority=-1))
    assert scheduler.may_admit


def test_among_equals_nobody_is_preempted_for_a_place():
    scheduler = scheduler_of(64, max_num_seqs=1)
    scheduler.enqueue(sequence_of(6, identity=1))
    step(scheduler)
    scheduler.enqueue(sequence_of(6, identity=2))
    assert step(scheduler).preempted == []


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_memory():
    scheduler = scheduler_of(10)
    running, large, small = sequence_of(16, identity=1), sequence_of(30, identity=2), sequence_of(1, identity=3)
    scheduler.enqueue(running)
    step(scheduler)
    scheduler.enqueue(large)
    scheduler.enqueue(small)
    step(scheduler)
    assert (large.status, small.status) == ("waiting", "waiting")
    while running.status == "running":
        step(scheduler)
    step(scheduler)
    assert (large.status, small.status) == ("running", "running")


def test_admission_leaves_every_running_sequence_a_block_to_grow_into():
    scheduler = scheduler_of(6)
    scheduler.enqueue(sequence_of(9, answer=4, identity=1))
    step(scheduler)
    late = sequence_of(12, answer=2, identity=2)
    scheduler.enqueue(late)
    assert scheduler.groups[0].pool.free == 3
    assert step(scheduler).preempted == []
    assert late.status == "waiting"


@pytest.mark.parametrize("windows", [(None,), (27,)])
def test_admission_keeps_back_what_running_prompts_have_yet_to_take(windows):
    scheduler = scheduler_of(9, windows=windows, max_num_seqs=2, max_num_batched_tokens=9, align=8)
    long, short = sequence_of(32, answer=2, identity=1), sequence_of(1, answer=2, identity=2)
    scheduler.enqueue(long)
    scheduler.enqueue(short)
    for _ in range(4):
        # a piece of 8 leaves a token of the step, and a block would be free
        assert shape(step(scheduler)) == [(1, long.computed - 8, 8, 0)]
        assert short.status == "waiting"
    while long.status == "running":
        step(scheduler)
    step(scheduler)
    assert (short.status, scheduler.preemptions) == ("running", 0)


def test_pieces_of_prompts_end_at_multiples_and_what_was_made_is_computed_again_token_by_token():
    scheduler = scheduler_of(64, max_num_seqs=1, max_num_batched_tokens=20, align=8, share_generated=False)
    sequence, urgent = sequence_of(27, priority=1), sequence_of(1, answer=1)
    scheduler.enqueue(sequence)
    assert [shape(step(scheduler)) for _ in range(4)] == [[(0, 0, 16, 0)], [(0, 16, 11, 0)], [(0, 27, 1, 0)], [(0, 28, 1, 0)]]
    scheduler.enqueue(urgent)
    assert step(scheduler).preempted == [sequence]
    # the last whole piece of the prompt was found
    assert [shape(step(scheduler)) for _ in range(4)] == [[(0, 24, 3, 0)], [(0, 27, 1, 0)], [(0, 28, 1, 0)], [(0, 29, 1, 0)]]


def test_without_sharing_what_was_made_only_the_prompt_is_found():
    for share_generated, cached in ((True, 16), (False, 8)):
        scheduler = scheduler_of(64, share_generated=share_generated)
        first = sequence_of(8, answer=10)
        run(scheduler, first)
        again = sequence_of(first.tokens)
        scheduler.enqueue(again)
        step(scheduler)
        assert again.cached == cached


def test_without_sharing_what_was_made_a_preempted_answer_does_not_find_anothers_prompt():
    scheduler = scheduler_of(64, max_num_seqs=1, share_generated=False)
    sequence = sequence_of(8, answer=20, identity=1, priority=1)
    scheduler.enqueue(sequence)
    for _ in range(10):
        step(scheduler)
    scheduler.enqueue(sequence_of([*sequence.tokens, 1, 2], answer=1))
    assert step(scheduler).preempted == [sequence]
    assert shape(step(scheduler)) == [(1, 8, 10, 0)]


def test_another_adapter_finds_nothing():
    scheduler = scheduler_of(64)
    run(scheduler, sequence_of(12, salt="poet"))
    other, same = sequence_of(12, salt="critic", identity=0), sequence_of(12, salt="poet", identity=0)
    for sequence in (other, same):
        scheduler.enqueue(sequence)
        step(scheduler)
    assert (other.cached, same.cached) == (0, 8)


def test_after_the_weights_change_nothing_is_found():
    scheduler = scheduler_of(64)
    run(scheduler, sequence_of(12))
    scheduler.forget()
    again = sequence_of(12)
    scheduler.enqueue(again)
    step(scheduler)
    assert again.cached == 0 and again.chain[0] == root_hash(None, 1)


def test_with_states_and_no_room_to_keep_them_no_prefix_is_found():
    scheduler = scheduler_of(64, state_slots=2)
    run(scheduler, sequence_of(12))
    again = sequence_of(12)
    scheduler.enqueue(again)
    step(scheduler)
    assert again.cached == 0


def test_where_prefixes_are_not_shared_none_is_found():
    scheduler = scheduler_of(64, share_prefixes=False)
    run(scheduler, sequence_of(12))
    again = sequence_of(12)
    scheduler.enqueue(again)
    step(scheduler)
    assert again.cached == 0


def test_with_states_that_are_kept_as_much_is_found_as_there_is_a_state_for():
    scheduler = scheduler_of(64, state_slots=2, snapshots=4)
    scheduler.enqueue(sequence_of(10, answer=1))
    assert shape(step(scheduler)) == [(0, 0, 10, 0)]
    again = sequence_of(10, answer=1)
    scheduler.enqueue(again)
    output = step(scheduler)
    assert shape(output) == [(0, 8, 2, 0)] and len(output.restored) == 1 and again.cached == 8


def test_a_state_after_a_single_block_is_found():
    scheduler = scheduler_of(64, state_slots=2, snapshots=4)
    run(scheduler, sequence_of(6, answer=1))
    again = sequence_of(6, answer=1)
    scheduler.enqueue(again)
    step(scheduler)
    assert again.cached == 4


def test_a_model_without_pages_is_scheduled_by_its_states():
    scheduler = scheduler_of(windows=(), state_slots=1)
    first, second = sequence_of(12, answer=2, identity=1), sequence_of(12, answer=2, identity=2)
    scheduler.enqueue(first)
    scheduler.enqueue(second)
    assert [shape(step(scheduler)) for _ in range(3)] == [[(1, 0, 12, 0)], [(1, 12, 1, 0)], [(2, 0, 12, 0)]]


def test_drafts_are_cut_to_the_pages_that_are_free_rather_than_anyone_preempted():
    scheduler = scheduler_of(5)
    first, second = sequence_of(7, answer=2, identity=1), sequence_of(7, answer=2, identity=2)
    scheduler.enqueue(first)
    scheduler.enqueue(second)
    step(scheduler)
    first.limit = 16
    first.draft = [1, 2, 3, 4, 5]
    output = scheduler.schedule()
    assert shape(output) == [(1, 7, 5, 4), (2, 7, 1, 0)]
    assert output.preempted == []


def test_drafts_end_where_one_more_token_reaches_the_limit():
    scheduler = scheduler_of(16)
    sequence = sequence_of(4, answer=5)
    scheduler.enqueue(sequence)
    step(scheduler)
    sequence.draft = [1] * 9
    assert shape(scheduler.schedule()) == [(0, 4, 4, 3)]


def test_drafts_leave_prompts_half_of_what_decoding_leaves_of_a_step():
    scheduler = scheduler_of(64, max_num_seqs=2, max_num_batched_tokens=11)
    first = sequence_of(4, answer=60, identity=1)
    scheduler.enqueue(first)
    step(scheduler)
    scheduler.enqueue(sequence_of(30, identity=2))
    first.draft = [1] * 20
    assert shape(scheduler.schedule()) == [(1, 4, 6, 5), (2, 0, 5, 0)]


def test_drafts_of_all_share_a_step():
    scheduler = scheduler_of(64, max_num_seqs=2, max_num_batched_tokens=8)
    sequences = [sequence_of(4, answer=60, identity=identity) for identity in range(2)]
    for sequence in sequences:
        scheduler.enqueue(sequence)
    step(scheduler)
    for sequence in sequences:
        sequence.draft = [1] * 4
    assert shape(scheduler.schedule()) == [(0, 4, 5, 4), (1, 4, 3, 2)]


def test_the_beginning_of_a_text_is_found_longer_than_its_end():
    scheduler = scheduler_of(8)
    run(scheduler, sequence_of(24, answer=2))
    for _ in range(4):
        scheduler.groups[0].pool.allocate()
    again = sequence_of(24, answer=1, identity=0)
    again.tokens, again.prompt_length, again.limit = again.tokens[:13], 13, 14
    scheduler.enqueue(again)
    step(scheduler)
    assert again.cached == 12


def test_what_a_window_allows_is_not_refused_however_long_it_gets():
    # 8 neighbouring keys lie in 3 blocks at most
    scheduler = scheduler_of(3, windows=(8,))
    sequence = sequence_of(40, answer=40)
    run(scheduler, sequence)
    assert len(sequence.tokens) == 80
    with pytest.raises(RequestError):
        scheduler_of(2, windows=(8,)).enqueue(sequence_of(40))


def test_what_was_preempted_in_a_step_begins_again_in_the_next_at_the_earliest():
    scheduler = scheduler_of(7, windows=(5,), max_num_seqs=3, max_num_batched_tokens=8)
    parent = sequence_of(15, answer=15, identity=1)
    scheduler.enqueue(parent)
    step(scheduler)
    for identity in (20, 21):
        scheduler.fork(parent, TokenSequence(identity, [*parent.tokens[:-1], 5], 15, 30))
    step(scheduler)
    urgent = sequence_of(6, identity=9, priority=-1)
    scheduler.enqueue(urgent)
    output = step(scheduler)
    # one of the two finds its blocks, which its parent shares with it, and would fit again
    assert [sequence.identity for sequence in output.preempted] == [21, 20]
    assert [chunk.sequence.identity for chunk in output.chunks] == [1, 9]
    while scheduler.has_work:
        assert step(scheduler).chunks
