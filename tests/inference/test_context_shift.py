"""Context shift: a text that outgrows the context loses its middle, and goes on as what is left of it."""

from __future__ import annotations

from functools import cache

import pytest

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.scheduling.sequence import tokens_to_drop
from bessemer.model.cpu_kernels import library
from tests.cases import slow
from tests.inference.models import small_decoder, small_tokenizer

CONTEXT, KEEP, ANSWER = 24, 5, 40
PROMPT = list(range(20, 33))
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=0, ignore_eos=True)


def engine_of(name, folder, **settings):
    config = EngineConfig(max_model_len=CONTEXT, block_size=4, threads=1, **settings)
    return Engine(small_decoder(name), small_tokenizer(folder), config=config)


def shifting(name, folder, **settings):
    return engine_of(name, folder, context_overflow="shift", context_keep=KEEP, **settings)


def without_middle(text):
    """As llama.cpp: the first tokens stay, and half of the places behind them become free."""
    while len(text) >= CONTEXT:
        text = text[:KEEP] + text[KEEP + (CONTEXT - KEEP) // 2 :]
    return text


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The answer's tokens and log-probabilities when every one is asked for as the next of a prompt of its own."""

    @cache
    def answer(name):
        engine = engine_of(name, tmp_path_factory.mktemp("fresh"), prefix_cache=False)
        text, made = list(PROMPT), []
        for _ in range(ANSWER):
            text = without_middle(text)
            (one,) = engine.generate([text], GREEDY.with_changes(max_tokens=1))
            text = text + one.token_ids
            made += one.log_probs
        return made

    return answer


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dense", {}),
        slow("dense", {"batch_invariant": True}),
        slow("dense", {"speculation": {"method": "ngram"}}),
        ("dense", {"cpu_kernels": "on"}),
        ("dense", {"async_scheduling": "on"}),
        ("windows", {"prefix_cache": False}),
        ("linear", {}),
    ],
    ids=str,
)
def test_after_a_shift_the_logits_are_those_of_what_is_left_as_a_prompt(name, settings, fresh, tmp_path):
    if settings.get("cpu_kernels") == "on" and library() is None:
        pytest.skip("no kernels")
    # log-probabilities are computed on the host, where an asynchronous engine does not run ahead
    params = GREEDY.with_changes(logprobs=None) if "async_scheduling" in settings else GREEDY
    engine, expected = shifting(name, tmp_path, **settings), fresh(name)
    together = engine.generate([PROMPT, PROMPT[:7]], params)
    assert together[0].token_ids == [one.token for one in expected] and together[0].finish_reason == "length"
    assert together[0].prompt_tokens == len(PROMPT) and len(together[1].token_ids) == ANSWER
    for one, other in zip(together[0].log_probs or (), expected, strict=False):
        assert one.log_probs.token == pytest.approx(other.log_probs.token, abs=1e-4)
    assert engine.statistics.preemptions == 0 and sum(used for _, used in engine.statistics.blocks) == 0


def test_a_prompt_that_is_too_long_loses_its_middle_and_the_answers_of_a_request_go_on_alike(tmp_path):
    long = [*range(20, 60), *range(20, 40)]
    engine = shifting("dense", tmp_path)
    whole = engine.generate([long], GREEDY.with_changes(n=2))[0]
    (expected,) = engine.generate([without_middle(long)], GREEDY)
    assert whole.token_ids == whole.others[0].token_ids == expected.token_ids
    assert whole.prompt_tokens == expected.prompt_tokens == len(without_middle(long)) < CONTEXT


def test_what_is_said_of_every_token_is_of_a_whole_text_alone(tmp_path):
    engine = shifting("dense", tmp_path)
    with pytest.raises(RequestError, match="max_model_len is 24"):
        engine.generate([[20] * 30], GREEDY.with_changes(prompt_logprobs=0))
    with pytest.raises(RequestError, match="context_overflow: refuse"):
        engine.rollouts([PROMPT], 2, GREEDY)
    ended = engine.generate([PROMPT], GREEDY.with_changes(prompt_logprobs=0))[0]
    assert len(PROMPT) + len(ended.token_ids) == CONTEXT and ended.finish_reason == "length"


def test_a_text_that_grows_is_cut_at_the_same_place_for_half_of_the_context():
    cuts = [tokens_to_drop(length, 100, 20) for length in range(60, 220)]
    assert cuts[:40] == [0] * 40 and cuts[40:80] == [40] * 40 and cuts[80:120] == [80] * 40
    assert all(20 < length - dropped < 100 for length, dropped in zip(range(60, 220), cuts, strict=True))
    assert tokens_to_drop(2, 2, 1) == 1
