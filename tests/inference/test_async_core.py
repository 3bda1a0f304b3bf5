"""Asynchronous scheduling, forced on: the answers that steps one after the other give."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest

from bessemer.inference.config import SpeculationConfig
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.execution.steps.asynchronous import AsyncSteps
from bessemer.inference.execution.steps.plain import PlainSteps
from bessemer.inference.execution.steps.speculative import SpeculativeSteps
from bessemer.model.cpu_kernels import library, unavailable
from tests.cases import slow_but
from tests.inference.models import small_decoder, small_tokenizer
from tests.inference.test_identity import COMPANY, PROMPTS, with_pages

LONG = [*range(90), 5, 4]
#: Requests of every kind that is sampled on the device, by prompt.
PLAIN = [
    (PROMPTS[0], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)),
    (PROMPTS[1], SamplingParams(temperature=0, max_tokens=9, stop_token_ids=list(range(0, 256, 5)))),
    (PROMPTS[2][:30], SamplingParams(seed=1, max_tokens=12, top_k=5)),
    (LONG, SamplingParams(seed=2, max_tokens=14, temperature=0.7, top_p=0.9, min_tokens=8)),
    (PROMPTS[4], SamplingParams(seed=3, max_tokens=12, min_p=0.1, repetition_penalty=1.3)),
    (LONG, SamplingParams(seed=4, max_tokens=16, temperature=2.0, presence_penalty=2.0, frequency_penalty=1.0, top_k=40)),
    ([8, 8], SamplingParams(seed=5, max_tokens=20, temperature=3.0, stop=["a", "e", "s", "t"], include_stop=True)),
    ([3] * 9, SamplingParams(seed=6, max_tokens=12, logit_bias={7: 4.0}, allowed_tokens=list(range(40)), banned_tokens=[9])),
    *[(prompt, SamplingParams(seed=seed, max_tokens=3 + seed % 9)) for seed, prompt in enumerate(COMPANY[:4])],
]
#: With some for which the steps wait: samples of one prompt, log-probabilities, typical_p, a prompt that is only read.
MIXED = [
    *PLAIN[:6],
    (LONG, SamplingParams(seed=7, max_tokens=12, n=3)),
    ([4, 5], SamplingParams(seed=8, max_tokens=6, logprobs=2)),
    ([4, 6], SamplingParams(seed=8, max_tokens=5, typical_p=0.6)),
    ([4, 7], SamplingParams(seed=9, max_tokens=5, prompt_logprobs=1)),
    ([4, 8], SamplingParams(max_tokens=0)),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("async"))


@pytest.fixture(scope="module")
def one_after_the_other(tokenizer):
    """The answers without it, computed once for all ways."""

    @cache
    def compute(kind, **settings):
        return in_company(tokenizer, {"plain": PLAIN, "mixed": MIXED}[kind], async_scheduling="off", **settings)

    return compute


@pytest.fixture
def launched_ahead(monkeypatch):
    """How many steps were launched behind one that was under way."""
    launch, count = EngineCore._launch, []

    def counted(core, current=None):
        step = launch(core, current)
        if current is not None and step is not None:
            count.append(step)
        return step

    monkeypatch.setattr(EngineCore, "_launch", counted)
    return count


def engine_of(tokenizer, name="dense", **settings):
    config = EngineConfig(**{"block_size": 8, "batch_invariant": True, "async_scheduling": "on", **settings})
    return Engine(small_decoder(name), tokenizer, config=config)


def answers(engine, requests, **how):
    prompts, params = zip(*requests, strict=True)
    return engine.generate(prompts, params, **how)


def in_company(tokenizer, requests, **settings):
    return answers(engine_of(tokenizer, **settings), requests)


def from_cached_pages(tokenizer, requests, **settings):
    engine = engine_of(tokenizer, **settings)
    answers(engine, requests)
    return answers(engine, requests)


def in_pieces(tokenizer, requests, **settings):
    return answers(engine_of(tokenizer, max_num_seqs=4, max_num_batched_tokens=11, **settings), requests)


def for_want_of_pages(tokenizer, requests, name="dense", **settings):
    settings = {"batch_invariant": True, "async_scheduling": "on", **settings}
    engine = with_pages(small_decoder(name), tokenizer, 16, **settings)
    found = answers(engine, requests)
    assert engine.core.scheduler.preemptions
    return found


def by_the_urgent(tokenizer, requests, **settings):
    engine = engine_of(tokenizer, max_num_seqs=6, **settings)
    begun = [engine.prepare(prompt, params, priority=5) for prompt, params in requests]
    for request in begun:
        engine.begin(request)
    for _ in range(4):
        engine.step()
    engine.generate(COMPANY[:3], SamplingParams(seed=1, max_tokens=9), priority=-1)
    assert engine.core.scheduler.preemptions
    while not all(each.done for request in begun for each in (request, *request.siblings)):
        engine.step()
    return [engine.completion(request, params) for request, (_, params) in zip(begun, requests, strict=True)]


WAYS = {
    "in company": in_company,
    "from cached pages": from_cached_pages,
    "in pieces": in_pieces,
    "preempted for want of pages": for_want_of_pages,
    "preempted by the urgent": by_the_urgent,
}
USUAL = {("preempted by the urgent", "dense"), ("preempted for want of pages", "windows")}


@pytest.mark.parametrize(("way", "name"), slow_but(USUAL, product(WAYS, ["dense", "windows", "experts", "latent"])))
def test_answers_are_those_of_steps_one_after_the_other(tokenizer, one_after_the_other, launched_ahead, way, name):
    found = WAYS[way](tokenizer, PLAIN, name=name)
    assert len(launched_ahead) > 10
    assert found == one_after_the_other("plain", name=name)


@pytest.mark.parametrize("way", slow_but(["preempted for want of pages"], WAYS))
def test_the_compiled_step_gives_the_same_answers(tokenizer, one_after_the_other, launched_ahead, way):
    if library() is None:
        pytest.skip(unavailable())
    settings = {"batch_invariant": False, "cpu_kernels": "on", "threads": 1}
    found = WAYS[way](tokenizer, PLAIN, **settings)
    assert launched_ahead
    assert found == one_after_the_other("plain", **settings)


@pytest.mark.parametrize("way", slow_but(["in company"], WAYS))
def test_requests_that_need_the_host_are_answered_beside_the_others(tokenizer, one_after_the_other, launched_ahead, way):
    found = WAYS[way](tokenizer, MIXED)
    # where places or blocks are few, one of them waits until the end
    assert launched_ahead or way not in ("in company", "from cached pages")
    assert found == one_after_the_other("mixed")


def test_a_step_is_under_way_between_two_and_none_when_all_have_ended(tokenizer):
    engine = engine_of(tokenizer)
    request = engine.prepare([1, 2, 3], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    engine.begin(request)
    for made in range(1, 4):
        engine.step()
        assert len(request.token_ids) == made and engine.core._launched is not None
    engine.stop(request)
    engine.step()
    short = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0]
    assert short.token_ids == request.token_ids
    assert engine.core._launched is None
    assert all(usage.used == 0 for usage in engine.statistics.blocks)


def test_a_token_behind_the_end_is_thrown_away(tokenizer, launched_ahead):
    engine = engine_of(tokenizer)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    tokens = engine.generate([[1, 2, 3]], params)[0].token_ids
    end = next(place for place in range(2, 20) if tokens[place] not in tokens[:place])
    launched_ahead.clear()
    found = engine.generate([[1, 2, 3]], params.with_changes(stop_token_ids=[tokens[end]]))[0]
    assert (found.token_ids, found.finish_reason) == (tokens[: end + 1], "stop")
    # one for each token but the first, and one behind the end
    assert len(launched_ahead) == end + 1
    assert engine.statistics.generated_tokens == 20 + end + 1


def test_weights_that_change_in_between_meet_no_token_of_the_ones_before(tokenizer):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    changed = {name: weight * 1.5 for name, weight in small_decoder("dense", seed=3).state_dict().items()}

    def run(until, **settings):
        engine = engine_of(tokenizer, **settings)
        request = engine.prepare([5, 6, 7], params)
        engine.begin(request)
        while len(request.token_ids) < until:
            engine.step()
        engine.update_weights(changed)
        while not request.done:
            engine.step()
        return request.token_ids, request.weight_versions

    found, versions = run(4)
    assert versions == [0] * 5 + [1] * 15
    assert (found, versions) == run(5, async_scheduling="off")


def test_it_is_for_gpus_and_steps_aside_where_it_cannot_be(tokenizer):
    def strategy(name="dense", **settings):
        return type(engine_of(tokenizer, name, **settings).core.strategy)

    assert strategy() is AsyncSteps
    assert strategy(async_scheduling="auto") is strategy(async_scheduling="off") is PlainSteps
    assert strategy("linear") is PlainSteps
    assert strategy(speculation=SpeculationConfig(method="ngram")) is SpeculativeSteps


def test_a_step_that_fails_ends_its_requests_and_those_before_get_their_tokens(tokenizer, monkeypatch):
    engine = engine_of(tokenizer)
    ending = engine.prepare([1], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    going = engine.prepare([2], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    for request in (ending, going):
        engine.begin(request)
    engine.step()

    def broken(batch, rows):
        raise RuntimeError("out of memory")

    engine.step()
    monkeypatch.setattr(engine.core.runner, "sample", broken)
    # the third token of both is under way, and the last of one
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    assert ending.finish_reason == "length" and "out of memory" in str(going.error)
    assert not engine.core.busy
