import pytest

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.pages import BlockPool
from bessemer.inference.scheduler import Group, Plan, Scheduler
from bessemer.inference.sequence import Sequence

SIZE = 4


def scheduler_of(*blocks: int, windows: tuple[int | None, ...] = (None,), **settings) -> Scheduler:
    groups = [Group(BlockPool(count, SIZE), window) for count, window in zip(blocks, windows, strict=True)]
    return Scheduler(groups, **({"max_running": 8, "max_step_tokens": 64} | settings))


def sequence_of(prompt: int | list[int], answer: int = 8, identity: int = 0, **settings) -> Sequence:
    """A prompt of so many tokens, all its own, and room for an answer."""
    tokens = [1000 * identity + index for index in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return Sequence(identity, tokens, len(tokens), len(tokens) + answer, **settings)


def step(scheduler: Scheduler, accepted: int = 0) -> Plan:
    """One step in which so many drafts are accepted; sequences at their limit finish. The new token is 7."""
    plan = scheduler.schedule()
    for work in plan.works:
        made = [*work.sequence.draft[: min(accepted, work.drafts)], 7] if work.wants else []
        scheduler.commit(work, made)
        if len(work.sequence.tokens) == work.sequence.limit:
            scheduler.finish(work.sequence)
    return plan


def run(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        assert step(scheduler).works


def shape(plan: Plan) -> list[tuple[int, int, int, int]]:
    return [(work.sequence.identity, work.start, work.count, work.drafts) for work in plan.works]


def test_a_prompt_is_computed_whole_and_then_one_token_after_the_other():
    scheduler = scheduler_of(8)
    scheduler.add(sequence_of(5, answer=3))
    assert shape(step(scheduler)) == [(0, 0, 5, 0)]
    assert shape(step(scheduler)) == [(0, 5, 1, 0)]
    assert shape(step(scheduler)) == [(0, 6, 1, 0)]
    assert not scheduler.has_work
    assert scheduler.groups[0].pool.free == 8


def test_a_long_prompt_is_computed_in_chunks_beside_those_that_decode():
    scheduler = scheduler_of(32, max_running=2, max_step_tokens=6)
    scheduler.add(sequence_of(3, identity=1))
    step(scheduler)
    scheduler.add(sequence_of(12, identity=2))
    plan = scheduler.schedule()
    assert shape(plan) == [(1, 3, 1, 0), (2, 0, 5, 0)]
    assert [work.wants for work in plan.works] == [1, 0]
    for work, made in zip(plan.works, ([7], []), strict=True):
        scheduler.commit(work, made)
    assert shape(step(scheduler)) == [(1, 4, 1, 0), (2, 5, 5, 0)]
    assert shape(step(scheduler)) == [(1, 5, 1, 0), (2, 10, 2, 0)]


def test_accepted_drafts_and_one_more_token_are_kept_and_the_rest_of_their_blocks_given_back():
    scheduler = scheduler_of(8)
    sequence = sequence_of(4, answer=20)
    scheduler.add(sequence)
    step(scheduler)
    sequence.draft = [11, 12, 13, 14, 15, 16]
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 4, 7, 6)]
    assert plan.works[0].wants == 7
    assert len(sequence.tables[0]) == 3
    scheduler.commit(plan.works[0], [11, 12, 9])
    assert sequence.tokens[4:] == [7, 11, 12, 9]
    assert (sequence.computed, sequence.draft, len(sequence.tables[0])) == (7, [], 2)


def test_a_second_request_finds_the_blocks_of_the_first():
    scheduler = scheduler_of(16)
    run(scheduler, sequence_of(10, answer=4))
    again = sequence_of(10)
    scheduler.add(again)
    assert shape(step(scheduler)) == [(0, 8, 2, 0)]
    assert again.cached == 8
    assert (scheduler.asked_tokens, scheduler.found_tokens, scheduler.groups[0].pool.hits) == (20, 8, 2)


def test_a_prompt_found_whole_still_computes_its_last_block():
    scheduler = scheduler_of(16)
    run(scheduler, sequence_of(8, answer=4))
    scheduler.add(sequence_of(8))
    assert shape(step(scheduler)) == [(0, 4, 4, 0)]


def test_the_least_urgent_is_preempted_keeps_its_tokens_and_its_place_in_the_queue():
    scheduler = scheduler_of(6)
    first, second = sequence_of(8, answer=12, identity=1), sequence_of(8, answer=12, identity=2)
    scheduler.add(first)
    scheduler.add(second)
    while not (plan := step(scheduler)).preempted:
        pass
    assert plan.preempted == [second]
    assert (second.status, second.computed, second.tables) == ("waiting", 0, [])
    made = second.tokens[8:]
    assert len(made) > 1
    late = sequence_of(4, identity=3)
    scheduler.add(late)
    while second.status == "waiting":
        assert late.status == "waiting"
        step(scheduler)
    assert second.tokens[8 : 8 + len(made)] == made


def test_what_could_never_fit_is_refused():
    scheduler = scheduler_of(4)
    scheduler.add(sequence_of(9, answer=8))  # 16 tokens have keys
    with pytest.raises(RequestError, match="may come to 18 tokens and the memory for keys and values holds 16;"):
        scheduler.add(sequence_of(9, answer=9))


def test_the_queue_has_a_limit_beyond_the_empty_places():
    scheduler = scheduler_of(64, max_running=2, max_waiting=1)
    for identity in range(3):
        scheduler.add(sequence_of(4, identity=identity))
    with pytest.raises(RequestError, match="3 requests wait already and max_waiting is 1; try again later"):
        scheduler.add(sequence_of(4))
    step(scheduler)
    with pytest.raises(RequestError, match="1 requests wait"):
        scheduler.add(sequence_of(4))


def test_a_step_too_small_for_what_runs_is_refused():
    with pytest.raises(ConfigError, match="raise max_step_tokens to at least 8"):
        scheduler_of(4, max_running=8, max_step_tokens=7)
    with pytest.raises(ConfigError, match="at least 71"):
        scheduler_of(4, max_running=8, align=64)


def test_an_aborted_sequence_frees_its_pages_at_once_and_its_work_is_left_out():
    scheduler = scheduler_of(8)
    sequence = sequence_of(5)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.abort(sequence)
    assert scheduler.groups[0].pool.free == 8
    scheduler.commit(plan.works[0], [7])
    assert len(sequence.tokens) == 5
    scheduler.abort(sequence)
    assert not scheduler.has_work


def test_a_fork_shares_the_prompt_and_copies_the_block_that_it_writes():
    scheduler = scheduler_of(16)
    parent, child = sequence_of(7, identity=1), sequence_of(7, identity=2)
    child.tokens = list(parent.tokens)
    scheduler.add(parent)
    step(scheduler)
    scheduler.fork(parent, child)
    assert child.computed == 6
    assert child.tables == parent.tables
    shared = parent.tables[0][1]
    plan = scheduler.schedule()
    assert shape(plan) == [(1, 7, 1, 0), (2, 6, 1, 0)]
    assert plan.copies == [(0, shared, parent.tables[0][1])]
    assert child.tables[0][1] == shared
    assert parent.tables[0][0] == child.tables[0][0]


def test_a_windowed_group_frees_blocks_that_no_query_sees():
    scheduler = scheduler_of(16, 16, windows=(None, 5), share_prefixes=False)
    sequence = sequence_of(4, answer=20)
    scheduler.add(sequence)
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
        scheduler.add(sequence)
    step(scheduler)
    assert {sequence.state_slot for sequence in sequences[:2]} == {0, 1}
    assert (sequences[2].state_slot, scheduler.waiting) == (None, 1)
    scheduler.finish(sequences[0])
    step(scheduler)
    assert sequences[2].state_slot is not None
