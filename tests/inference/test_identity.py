"""One answer, however it is computed: alone, in company, from cached pages, in pieces, preempted and begun anew."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from bessemer.inference.engine import Completion, Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.kv_cache import block_bytes, layer_groups, state_bytes
from bessemer.model.cpu_kernels import library, unavailable
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, small_decoder, small_tokenizer

GIB = 1 << 30
BLOCK = 8
PARAMS = SamplingParams(temperature=0, max_tokens=24, logprobs=2, ignore_eos=True)
#: Texts of one to a hundred tokens; the last two begin alike.
PROMPTS = [[7], [9] * 20, list(range(40, 103)), list(range(100)), [*range(90), 3, 2, 1]]
COMPANY = [[(seed * 31 + place * 7) % 250 for place in range(3 + seed)] for seed in range(31)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def answers_alone(tokenizer):
    """Each prompt's answer of an architecture, computed alone, once for all ways."""
    return cache(lambda name, **settings: alone(small_decoder(name), tokenizer, **settings))


def engine_of(model, tokenizer, **settings):
    return Engine(model, tokenizer, config=EngineConfig(**{"block_size": BLOCK, **settings}))


def with_pages(model, tokenizer, blocks, **settings):
    """An engine whose every group of layers has about so many pages."""
    sizes = [block_bytes(model.config, group, BLOCK, torch.float32) for group in layer_groups(model.config)]
    states = 10.5 * state_bytes(model.config, torch.float32)
    memory = (blocks + 0.5) * sum(sizes) + states
    return engine_of(model, tokenizer, kv_memory=memory / GIB, state_memory=states / GIB, **settings)


def alone(model, tokenizer, **settings):
    """Each prompt in an engine of its own."""
    return [engine_of(model, tokenizer, **settings).generate([prompt], PARAMS)[0] for prompt in PROMPTS]


def in_company(model, tokenizer, **settings):
    engine = engine_of(model, tokenizer, **settings)
    params = [PARAMS] * len(PROMPTS) + [SamplingParams(seed=seed, max_tokens=3 + seed % 9) for seed in range(len(COMPANY))]
    return engine.generate(PROMPTS + COMPANY, params)[: len(PROMPTS)]


def from_cached_pages(model, tokenizer, **settings):
    engine = engine_of(model, tokenizer, **settings)
    engine.generate(PROMPTS, PARAMS)
    completions = engine.generate(PROMPTS, PARAMS)
    assert [completion.cached_tokens for completion in completions] == [0, 16, 56, 96, 88]
    return completions


def in_pieces(model, tokenizer, **settings):
    return engine_of(model, tokenizer, max_num_seqs=4, max_num_batched_tokens=11, **settings).generate(PROMPTS, PARAMS)


def preempted_for_want_of_pages(model, tokenizer, **settings):
    engine = with_pages(model, tokenizer, 20, **settings)
    completions = engine.generate(PROMPTS + PROMPTS, PARAMS)
    assert engine.core.scheduler.preemptions or None not in [group.window for group in layer_groups(model.config)]
    return completions[len(PROMPTS) :]


def preempted_by_the_urgent(model, tokenizer, **settings):
    engine = engine_of(model, tokenizer, max_num_seqs=len(PROMPTS), **settings)
    streams = [engine.stream(prompt, PARAMS, priority=5) for prompt in PROMPTS]
    chunks = [[next(stream) for _ in range(1 + place)] for place, stream in enumerate(streams)]
    engine.generate(COMPANY[:3], SamplingParams(seed=1, max_tokens=9), priority=-1)
    assert engine.core.scheduler.preemptions == 3
    chunks = [begun + list(stream) for begun, stream in zip(chunks, streams, strict=True)]
    return [
        Completion(
            "".join(chunk.text for chunk in of_one),
            [token for chunk in of_one for token in chunk.token_ids],
            of_one[-1].finish_reason,
            len(prompt),
            [one for chunk in of_one for one in chunk.log_probs],
        )
        for prompt, of_one in zip(PROMPTS, chunks, strict=True)
    ]


WAYS = {
    "in company": in_company,
    "from cached pages": from_cached_pages,
    "in pieces": in_pieces,
    "preempted for want of pages": preempted_for_want_of_pages,
    "preempted by the urgent": preempted_by_the_urgent,
}


#: The way on which what an architecture has of its own could break; between them they go every way.
TELLING = {
    "windows": "preempted for want of pages",  # two groups of layers, of which one frees the pages behind its window
    "windows only": "from cached pages",  # the first pages are freed, and not needed
    "experts": "in company",  # an expert multiplies rows of several requests at once
    "latent": "in pieces",  # keys are expanded again from the pages of earlier chunks
    "linear": "preempted by the urgent",  # a state is dropped and computed again
    "sinks and caps": "in pieces",  # the sink joins the softmax of every chunk
    "alibi": "in pieces",  # the bias depends on the position at which a chunk begins
    "learned positions": "from cached pages",  # the embedding depends on the first position that is not cached
}
#: Of these bit for bit on every run, one of each way and what is taken back; the others but for ties, or by the compiled step.
EXACTLY = ("windows", "experts", "latent", "linear")
#: Those that the compiled step computes whole.
COMPILED = [name for name in ARCHITECTURES if name not in ("experts", "latent", "linear", "alibi", "learned positions")]


USUAL = {*TELLING.items(), *product(["dense"], WAYS)}
#: Where the same ways are gone again with other arithmetic.
AGAIN = {("dense", "in company"), ("windows", "preempted for want of pages"), ("linear", "preempted by the urgent")}


def every_way(names, usual=USUAL):
    return pytest.mark.parametrize(("name", "way"), slow_but(usual, product(names, WAYS)))


# of the dense one the compiled step, which computes by the same kernels, goes every way
@every_way(ARCHITECTURES, {(name, TELLING[name]) for name in EXACTLY} | {("dense", "in company")})
def test_an_invariant_engine_gives_the_same_numbers_every_way(tokenizer, answers_alone, name, way):
    found = WAYS[way](small_decoder(name), tokenizer, batch_invariant=True)
    assert found == answers_alone(name, batch_invariant=True)


@pytest.mark.parametrize("way", slow_but(["in company"], WAYS))
def test_an_invariant_engine_gives_the_same_numbers_on_several_threads(tokenizer, way):
    model, before = small_decoder("dense"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert WAYS[way](model, tokenizer, batch_invariant=True) == alone(model, tokenizer, batch_invariant=True)
    finally:
        torch.set_num_threads(before)


@every_way(ARCHITECTURES, AGAIN)
def test_tokens_are_the_same_every_way_but_for_ties(tokenizer, answers_alone, name, way):
    found = WAYS[way](small_decoder(name), tokenizer)
    for one, other in zip(found, answers_alone(name, batch_invariant=True), strict=True):
        assert_same_but_for_ties(one, other)


@pytest.fixture
def kernels():
    if library() is None:
        pytest.skip(unavailable())


@every_way(COMPILED)
def test_the_compiled_step_gives_the_same_numbers_every_way(kernels, tokenizer, answers_alone, name, way):
    model = small_decoder(name)
    assert CompiledSteps.supports(model) is None
    found = WAYS[way](model, tokenizer, cpu_kernels="on", threads=2)
    assert found == answers_alone(name, cpu_kernels="on", threads=1)


@every_way(ARCHITECTURES, AGAIN)
def test_compiled_attention_gives_the_same_tokens_every_way_but_for_ties(kernels, tokenizer, answers_alone, name, way):
    found = WAYS[way](small_decoder(name), tokenizer, cpu_kernels="on")
    for one, other in zip(found, answers_alone(name, batch_invariant=True), strict=True):
        assert_same_but_for_ties(one, other)


def assert_same_but_for_ties(one, other):
    """The same tokens up to a place where the two likeliest are within 1e-4 of each other."""
    for first, second in zip(one.log_probs, other.log_probs, strict=True):
        (_, likeliest), (_, next_likeliest) = second.log_probs.top
        assert abs(first.log_probs.top[0][1] - likeliest) < 1e-3
        if first.token != second.token:
            assert likeliest - next_likeliest <= 1e-4
            return
