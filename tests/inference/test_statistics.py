"""The engine's statistics, against runs whose counts are known."""

from __future__ import annotations

import threading
import time

import pytest

from bessemer.core.errors import RequestError
from bessemer.inference.engine import SamplingParams
from tests.inference.models import small_decoder, small_tokenizer
from tests.inference.test_identity import engine_of, with_pages
from tests.inference.test_speculation import Scripted, speculating

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [*range(40, 60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="module")
def dense():
    return small_decoder("dense")


@pytest.fixture
def engine(dense, tokenizer):
    return engine_of(dense, tokenizer, block_size=4)


def test_the_counts_of_a_prompt_and_its_repetition(engine):
    engine.generate([PROMPT], GREEDY)
    first = engine.statistics
    # one step reads the prompt and makes a token, four make the others
    assert (first.steps, first.computed_tokens, first.prompt_tokens, first.generated_tokens) == (5, 24, 20, 5)
    assert (first.prefix_cache_query_tokens, first.prefix_cache_hit_tokens) == (20, 0)
    engine.generate([PROMPT], GREEDY)
    second = engine.statistics
    # four blocks are found, and the fifth computed for its logits
    assert (second.steps, second.computed_tokens, second.prompt_tokens, second.generated_tokens) == (10, 24 + 8, 40, 10)
    assert (second.prefix_cache_query_tokens, second.prefix_cache_hit_tokens) == (40, 16)
    assert second.finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert first.finished["length"] == 1, "what was read stays as it was"


def test_times_are_counted_once_for_each_step_request_and_completion(engine):
    begun = time.perf_counter()
    engine.generate([PROMPT, PROMPT[:3]], GREEDY.with_changes(n=2, temperature=1))
    engine.generate([PROMPT], GREEDY.with_changes(max_tokens=1))
    seconds = time.perf_counter() - begun
    found = engine.statistics
    assert found.step_seconds.total == found.steps > 0
    assert found.time_to_first_token_seconds.total == 5
    assert found.time_per_output_token_seconds.total == 4, "a single token has none after it"
    # the five tokens of four completions, of which the first of each has none before it
    assert found.inter_token_seconds.total == 4 * 4
    for histogram in (found.request_seconds, found.queue_seconds, found.prefill_seconds, found.decode_seconds):
        assert histogram.total == 5
    parts = found.queue_seconds.sum + found.prefill_seconds.sum + found.decode_seconds.sum
    assert found.request_seconds.sum == pytest.approx(parts, rel=1e-6)
    assert (found.request_prompt_tokens.sum, found.request_generated_tokens.sum) == (3 * 20 + 2 * 3, 4 * 5 + 1)
    assert (found.step_tokens.total, found.step_tokens.sum) == (found.steps, found.computed_tokens)
    for histogram in (
        *(found.step_seconds, found.time_to_first_token_seconds, found.inter_token_seconds),
        *(found.time_per_output_token_seconds, found.request_seconds, found.prefill_seconds),
    ):
        assert len(histogram.counts) == len(histogram.bounds) + 1
        assert histogram.cumulative[-1] == histogram.total
        lower, upper = (0, *histogram.bounds), (*histogram.bounds, float("inf"))
        least = sum(bound * count for bound, count in zip(lower, histogram.counts, strict=True))
        most = sum(bound * count for bound, count in zip(upper, histogram.counts, strict=True) if count)
        assert least <= histogram.sum <= most
        assert 0 < histogram.sum < seconds * histogram.total
    assert found.step_seconds.sum < seconds


def test_what_is_in_flight_and_how_it_ends(engine):
    def fails(prompt, answer, logits):
        raise ValueError("no such word")

    stopped, failing = engine.prepare(PROMPT, GREEDY), engine.prepare(PROMPT, GREEDY.with_changes(logits_processor=fails))
    engine.begin(stopped)
    assert (engine.statistics.waiting, engine.statistics.running) == (1, 0)
    engine.step()
    found = engine.statistics
    assert (found.waiting, found.running) == (0, 1)
    # 20 tokens in blocks of 4; the next token's block is taken when it is computed
    assert [used for _, used in found.blocks] == [5] and found.blocks[0].total == engine.core.scheduler.groups[0].pool.total
    engine.stop(stopped)
    engine.begin(failing)
    while not failing.done:
        engine.step()
    assert isinstance(failing.error, RequestError)
    found = engine.statistics
    assert found.finished == {"stop": 0, "length": 0, "abort": 1, "error": 1}
    assert (found.waiting, found.running, found.blocks[0].used) == (0, 0, 0)


def test_a_preemption_is_counted_and_its_tokens_once(dense, tokenizer):
    engine = with_pages(dense, tokenizer, 8, prefix_cache=False)
    completions = engine.generate([[7], [8, 9], [10]], GREEDY.with_changes(max_tokens=36))
    found = engine.statistics
    assert found.preemptions > 0
    assert (found.prompt_tokens, found.generated_tokens, found.finished["length"]) == (4, 3 * 36, 3)
    assert found.prefix_cache_query_tokens == 4
    # without preemptions, all but the last token of each is computed once
    assert found.computed_tokens > sum(one.prompt_tokens + 36 - 1 for one in completions)


def test_accepted_and_rejected_drafts_are_counted(dense, tokenizer):
    (expected,) = engine_of(dense, tokenizer).generate([PROMPT], GREEDY)
    right = speculating(dense, tokenizer, Scripted([(PROMPT, expected)], "right"))
    right.generate([PROMPT], GREEDY)
    found = right.statistics
    # the step after the prompt's has a draft of three and makes the four tokens that are left
    assert (found.drafts, found.draft_tokens_proposed, found.draft_tokens_accepted) == (1, 3, 3)
    assert (found.steps, found.computed_tokens, found.generated_tokens) == (2, 20 + 4, 5)
    wrong = speculating(dense, tokenizer, Scripted([(PROMPT, expected)], "wrong"))
    wrong.generate([PROMPT], GREEDY)
    found = wrong.statistics
    # drafts of three, two and one; the last token leaves no place for one
    assert (found.drafts, found.draft_tokens_proposed, found.draft_tokens_accepted) == (3, 3 + 2 + 1, 0)
    assert (found.steps, found.generated_tokens) == (5, 5)


def test_statistics_are_of_one_moment_between_steps(engine):
    """Read while another thread generates: what began is in flight or has ended."""
    count, params = 40, GREEDY.with_changes(max_tokens=3)
    thread = threading.Thread(target=lambda: [engine.generate([PROMPT] * 4, params) for _ in range(count // 4)])
    thread.start()
    while thread.is_alive():
        found = engine.statistics
        begun = found.prompt_tokens // len(PROMPT)
        assert begun == found.running + found.waiting + sum(found.finished.values())
        assert found.generated_tokens >= 3 * found.finished["length"]
    thread.join()
    assert engine.statistics.finished["length"] == count
