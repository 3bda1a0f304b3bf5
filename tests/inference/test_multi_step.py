"""Several tokens in one call are those of steps of one token."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.cpu_kernels import library, unavailable
from tests.inference.models import small_decoder, small_tokenizer

pytestmark = pytest.mark.skipif(library() is None, reason=unavailable() or "")

PROMPTS = [[7, 8, 9], list(range(40, 73)), [*range(40, 72), 99], [5]]
LOG_PROBS = {"logprobs": 0, "logprobs_mode": "temperature"}
#: Ends of all kinds, of which some come within a call: the limit, a stop token, a stop string, a token that is likely.
PARAMS = [
    SamplingParams(temperature=1.0, max_tokens=30, seed=1, **LOG_PROBS),
    SamplingParams(temperature=0, max_tokens=23, **LOG_PROBS),
    SamplingParams(temperature=0.7, max_tokens=40, seed=2, stop=["e", "a", "1"]),
    SamplingParams(temperature=1.3, max_tokens=40, seed=3, stop_token_ids=list(range(0, 200, 9))),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("several"))


def engine_of(model, tokenizer, **settings):
    return Engine(model, tokenizer, config=EngineConfig(**{"block_size": 8, "cpu_kernels": "on", "threads": 2, **settings}))


def one_by_one(engine, prompts, params):
    """What a reader gets who wants each token as it comes."""
    requests = [engine.prepare(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    for request in requests:
        engine.begin(request)
    while not all(each.done for request in requests for each in (request, *request.siblings)):
        engine.step()
    return [engine.completion(request, own) for request, own in zip(requests, params, strict=True)]


@pytest.mark.parametrize("architecture", ["dense", "windows"])
def test_completions_are_those_of_single_steps(architecture, tokenizer):
    model = small_decoder(architecture)
    expected = one_by_one(engine_of(model, tokenizer), PROMPTS, PARAMS)
    assert {one.finish_reason for one in expected} == {"stop", "length"}
    assert engine_of(model, tokenizer).generate(PROMPTS, PARAMS) == expected


def test_samples_of_a_prompt_take_few_steps(tokenizer):
    model, params = small_decoder("dense"), [PARAMS[0].with_changes(n=5, ignore_eos=True)] * 2
    plain, several = engine_of(model, tokenizer), engine_of(model, tokenizer)
    expected = one_by_one(plain, PROMPTS[:2], params)
    assert several.generate(PROMPTS[:2], params) == expected
    assert several.statistics.steps < plain.statistics.steps / 4
    assert several.statistics.generated_tokens == plain.statistics.generated_tokens == 300


def test_where_blocks_run_out_sequences_wait_and_go_on(tokenizer):
    model, params = (
        small_decoder("dense"),
        [PARAMS[0].with_changes(seed=seed, max_tokens=60, ignore_eos=True) for seed in range(4)],
    )
    scarce = engine_of(model, tokenizer, kv_memory=7e-5)
    assert scarce.generate(PROMPTS, params) == engine_of(model, tokenizer).generate(PROMPTS, params)
    assert scarce.statistics.preemptions


def test_one_that_is_more_urgent_begins_in_between(tokenizer):
    engine = engine_of(small_decoder("dense"), tokenizer, max_num_seqs=1)
    later, urgent = (
        engine.prepare(prompt, PARAMS[0].with_changes(ignore_eos=True), priority=priority, streams=False)
        for prompt, priority in zip(PROMPTS[:2], (1, 0), strict=True)
    )
    engine.begin(later)
    engine.step()
    engine.step()
    engine.begin(urgent)
    while not urgent.done:
        engine.step()
        assert not later.done
    while not later.done:
        engine.step()
    made = [engine.completion(request, PARAMS[0]) for request in (later, urgent)]
    alone = engine_of(small_decoder("dense"), tokenizer)
    assert made == alone.generate(PROMPTS[:2], PARAMS[0].with_changes(ignore_eos=True))


def test_one_who_waits_for_each_token_makes_it_steps_of_one(tokenizer):
    engine = engine_of(small_decoder("dense"), tokenizer)
    watched, other = engine.prepare([5], PARAMS[1]), engine.prepare(PROMPTS[1], PARAMS[0], streams=False)
    for request in (watched, other):
        engine.begin(request)
    while not watched.done:
        engine.step()
        assert len(watched.chunks) <= 1 or all(len(chunk.token_ids) == 1 for chunk in watched.chunks)
    assert len(watched.drain()) == len(watched.token_ids)


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    model = small_decoder("dense")
    with torch.no_grad():
        model.embed_tokens.weight[40] = torch.nan
    with pytest.raises(RequestError, match="not finite"):
        engine_of(model, tokenizer).generate([PROMPTS[1]], PARAMS[0])
