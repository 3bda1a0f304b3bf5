"""States of linear attention kept at the ends of blocks: who finds which, and what becomes of the places."""

from __future__ import annotations

import pytest

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.scheduling.recurrent_states import SnapshotPool
from tests.cases import slow
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.inference.test_scheduler import SIZE, run, scheduler_of, sequence_of, step
from tests.model.randomised import random_decoder

PREFIX = list(range(1000))
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)


def hybrid_scheduler(blocks=2000, snapshots=64, **settings):
    return scheduler_of(blocks, **({"state_slots": 8, "snapshots": snapshots, "max_num_batched_tokens": 2048} | settings))


def found(scheduler, tokens, identity):
    """Run a request to its end; how many of its tokens were found."""
    sequence = sequence_of(tokens, answer=2, identity=identity)
    run(scheduler, sequence)
    return sequence.cached


@pytest.mark.parametrize("step_tokens", [2048, 100])
def test_who_goes_on_from_a_text_of_a_thousand_tokens_reads_at_most_a_block_of_it(step_tokens):
    scheduler = hybrid_scheduler(max_num_batched_tokens=step_tokens)
    found(scheduler, PREFIX, 1)
    assert found(scheduler, [*PREFIX, 5, 5, 5], 2) > len(PREFIX) - SIZE


def test_the_second_that_parts_from_a_text_finds_two_thirds_of_what_it_shares_and_the_third_all():
    scheduler = hybrid_scheduler()
    found(scheduler, [*PREFIX, *[1] * 300], 1)
    assert found(scheduler, [*PREFIX, *[2] * 300], 2) >= 2 / 3 * len(PREFIX)
    assert found(scheduler, [*PREFIX, *[3] * 300], 3) > len(PREFIX) - SIZE


def test_of_two_that_come_together_the_second_finds_the_state_where_they_part():
    scheduler = hybrid_scheduler(max_num_batched_tokens=300)
    first, second = sequence_of([*PREFIX, *[1] * 50], identity=1), sequence_of([*PREFIX, *[2] * 50], identity=2)
    run(scheduler, first, second)
    assert second.cached > len(PREFIX) - SIZE


def test_a_parallel_sample_reads_at_most_the_last_block_of_its_prompt():
    scheduler = hybrid_scheduler()
    parent, child = sequence_of(PREFIX, identity=1), sequence_of(PREFIX, identity=2)
    scheduler.enqueue(parent)
    step(scheduler)
    scheduler.fork(parent, child)
    output = step(scheduler)
    assert {chunk.sequence: chunk.count for chunk in output.chunks} == {parent: 1, child: SIZE}


def test_the_next_turn_finds_the_answer_that_it_goes_on_from():
    scheduler = hybrid_scheduler()
    first = sequence_of(PREFIX[:30], answer=40)
    run(scheduler, first)
    assert found(scheduler, [*first.tokens, 1, 2, 3], 2) >= len(first.tokens) - SIZE


def test_an_answer_keeps_one_state_however_long_it_gets():
    scheduler = hybrid_scheduler()
    run(scheduler, sequence_of(2, answer=60))
    pool = scheduler.states.pool
    assert pool.total - len(pool._blank) == 1


def test_who_is_preempted_goes_on_from_the_last_whole_block():
    scheduler = hybrid_scheduler()
    sequence = sequence_of(20, answer=40)
    scheduler.enqueue(sequence)
    while sequence.computed < 37:
        step(scheduler)
    scheduler.preempt_all()
    (chunk,) = step(scheduler).chunks
    assert chunk.start == 36


def test_the_state_after_a_guess_that_did_not_come_true_is_not_found():
    scheduler = hybrid_scheduler()
    sequence = sequence_of(6, answer=40)
    scheduler.enqueue(sequence)
    step(scheduler)
    sequence.draft = [50, 51, 52, 53]
    step(scheduler, accepted=1)
    assert sequence.computed == 8
    # the end of a block at 8 was reached; that at 12 would have needed more guesses
    sequence.draft = [60, 61, 62]
    step(scheduler, accepted=0)
    assert sequence.tokens[8:] == [7, 7]
    assert found(scheduler, [*sequence.tokens[:9], 60, 61, 62, 1], 2) == 8


def test_what_was_used_longest_ago_goes_first():
    pool = SnapshotPool(2)
    for key in (b"a", b"b"):
        pool.seal(pool.allocate(), key, passing=False)
    pool.use(b"a")
    pool.seal(pool.allocate(), b"c", passing=False)
    assert [key in pool for key in (b"a", b"b", b"c")] == [True, False, True]


def test_a_state_that_another_asked_for_stays_when_its_sequence_moves_on():
    pool = SnapshotPool(2)
    for key in (b"a", b"b"):
        pool.seal(pool.allocate(), key, passing=True)
    pool.use(b"a")
    pool.drop(b"a")
    pool.drop(b"b")
    assert [key in pool for key in (b"a", b"b")] == [True, False]


def test_after_the_weights_change_no_state_is_found():
    scheduler = hybrid_scheduler()
    found(scheduler, PREFIX, 1)
    scheduler.forget()
    assert found(scheduler, PREFIX, 2) == 0


def test_a_model_without_pages_finds_its_states():
    scheduler = scheduler_of(windows=(), state_slots=2, snapshots=9, block_size=SIZE)
    found(scheduler, PREFIX[:50], 1)
    assert found(scheduler, PREFIX[:60], 2) == 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def long_hybrid():
    return random_decoder(BASE.with_changes(**ARCHITECTURES["linear"], max_position_embeddings=1100), 0)


def test_a_hybrid_engine_reads_at_most_a_block_of_a_thousand_tokens_again_with_the_same_bits(long_hybrid, tokenizer):
    config = EngineConfig(batch_invariant=True)
    prefix = [token % 250 for token in PREFIX]
    engine = Engine(long_hybrid, tokenizer, config=config)
    engine.generate([prefix], GREEDY)
    (second,) = engine.generate([[*prefix, 5, 6, 7]], GREEDY)
    assert second.cached_tokens > 1000 - config.block_size
    assert second == Engine(long_hybrid, tokenizer, config=config).generate([[*prefix, 5, 6, 7]], GREEDY)[0]


@pytest.mark.parametrize("invariant", [False, slow(True)])
def test_speculation_and_samples_from_kept_states_change_no_token(tokenizer, invariant):
    model = small_decoder("linear")
    settings = {"block_size": 8, "batch_invariant": invariant}
    prompt = [*range(30), *range(30), *range(25)]
    params = SamplingParams(seed=5, n=2, max_tokens=30, ignore_eos=True, allowed_tokens=[3, 4, 5])
    guessing = Engine(model, tokenizer, config=EngineConfig(speculation={"method": "ngram", "adapt": False}, **settings))
    (first,), (again,) = guessing.generate([prompt], params), guessing.generate([prompt], params)
    assert guessing.statistics.draft_tokens_accepted > 0 and again.cached_tokens == 80
    (alone,) = Engine(model, tokenizer, config=EngineConfig(prefix_cache=False, **settings)).generate([prompt], params)
    assert first == again == alone


def test_the_memory_of_kept_states_is_part_of_what_is_given(tokenizer):
    engine = Engine(small_decoder("linear"), tokenizer, config=EngineConfig(kv_memory=0.001))
    pool = engine.core.scheduler.states.pool
    engine.generate([list(range(100))] * 2, SamplingParams(max_tokens=2))
    memory = engine.core.runner.memory
    kept = sum(part.nbytes for state in memory.snapshots.values() for part in state)
    assert 0 < kept + memory.nbytes <= 0.001 * (1 << 30)
    assert f"{pool.total:,} saved states" in engine.describe()


def test_without_a_prefix_cache_no_state_is_kept(tokenizer):
    engine = Engine(small_decoder("linear"), tokenizer, config=EngineConfig(prefix_cache=False))
    assert engine.core.scheduler.states.pool.total == 0
