"""Pages read where they lie, by FlexAttention's kernels for a card, and steps of one token each as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.cuda_graphs import cannot_be_static
from bessemer.inference.execution.flash_attention import is_installed
from bessemer.inference.execution.paged_attention import GatheredAttention
from tests.gpu.comparison import assert_same_but_for_ties
from tests.inference.models import ARCHITECTURES, BASE
from tests.model.randomised import random_decoder

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(temperature=0, max_tokens=20, logprobs=2, ignore_eos=True)
#: In tiles of 1, 16 and 128 queries.
PROMPTS = [[7], [9] * 12, list(range(40, 140))]


#: Those whose attention is like that of another here.
ALIKE = ("experts", "windows only", "learned positions")


def each_of(names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in names]


def wide_decoder(name, seed=0):
    """As `small_decoder`, with heads of 16 channels: the kernels take no narrower ones."""
    return random_decoder(BASE.with_changes(head_dim=16, **ARCHITECTURES[name]), seed)


def engine_of(model, tokenizer, **settings):
    settings = {"paged_attention": "flex", "cuda_graphs": False, "block_size": 16, "max_num_seqs": 4, **settings}
    return Engine(model, tokenizer, config=EngineConfig(**settings))


@pytest.mark.parametrize("name", each_of(ARCHITECTURES))
def test_tokens_are_those_over_gathered_pages(name, tokenizer, device):
    model = wide_decoder(name).to(device)
    gathered = engine_of(model, tokenizer, paged_attention="gather").generate(PROMPTS, PARAMS)
    engine = engine_of(model, tokenizer)
    assert engine.core.runner.memory.by_head
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), gathered)
    # the second time from cached pages
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), gathered)


@pytest.mark.parametrize("block_size", [32, 128])
def test_pages_may_be_longer(block_size, tokenizer, device):
    model = wide_decoder("windows").to(device)
    gathered = engine_of(model, tokenizer, paged_attention="gather").generate(PROMPTS, PARAMS)
    found = engine_of(model, tokenizer, block_size=block_size).generate(PROMPTS, PARAMS)
    assert_same_but_for_ties(found, gathered)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_pages_give_nearly_the_same(dtype, tokenizer, device):
    model = wide_decoder("dense").to(device)
    gathered = engine_of(model, tokenizer, paged_attention="gather", kv_cache_dtype=dtype).generate(PROMPTS, PARAMS)
    found = engine_of(model, tokenizer, kv_cache_dtype=dtype).generate(PROMPTS, PARAMS)
    assert_same_but_for_ties(found, gathered, error=0.05, tie=0.05)


def captured(engine):
    """Rows of the steps that an engine has captured."""
    return sorted(engine.core.runner.backend.whole._steps)


@pytest.mark.parametrize("name", each_of(name for name in ARCHITECTURES if name not in ("experts", "linear")))
def test_replayed_steps_give_the_same_tokens(name, tokenizer, device):
    model = wide_decoder(name).to(device)
    expected = engine_of(model, tokenizer).generate(PROMPTS, PARAMS)
    engine = engine_of(model, tokenizer, cuda_graphs=True)
    # three rows are filled up to four
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), expected)
    assert captured(engine) == [1, 2, 4]
    assert_same_but_for_ties(engine.generate(PROMPTS[:2], PARAMS), expected[:2])
    assert_same_but_for_ties(engine.generate(PROMPTS[2:], PARAMS), expected[2:])


def test_replayed_steps_of_experts_give_nearly_the_same_tokens(tokenizer, device):
    model = wide_decoder("experts").to(device, torch.bfloat16)
    if reason := cannot_be_static(model):
        pytest.skip(reason)
    expected = engine_of(model, tokenizer).generate(PROMPTS, PARAMS)
    engine = engine_of(model, tokenizer, cuda_graphs=True)
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), expected, error=0.1, tie=0.1)
    assert captured(engine) == [1, 2, 4]


@pytest.mark.parametrize("name", ["experts", "linear"])
def test_what_no_graph_can_repeat_is_computed_without(name, tokenizer, device):
    model = wide_decoder(name).to(device)
    engine = engine_of(model, tokenizer, cuda_graphs=True)
    assert engine.core.runner.backend.whole is None
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), engine_of(model, tokenizer).generate(PROMPTS, PARAMS))


def test_replayed_steps_compute_with_weights_that_were_replaced(tokenizer, device):
    engine = engine_of(wide_decoder("dense").to(device), tokenizer, cuda_graphs=True)
    engine.generate(PROMPTS, PARAMS)
    other = wide_decoder("dense", seed=5).to(device)
    engine.update_weights(other.state_dict())
    assert captured(engine)  # the weights lie where they lay, so the graphs are still good
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), engine_of(other, tokenizer).generate(PROMPTS, PARAMS))


def test_replayed_steps_compute_with_weights_that_a_trainer_changed_or_moved(tokenizer, device):
    model = wide_decoder("dense").to(device)
    engine = engine_of(model, tokenizer, cuda_graphs=True)
    engine.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), engine_of(model, tokenizer).generate(PROMPTS, PARAMS))
    with torch.no_grad():
        model.norm.weight.data = model.norm.weight.data / 2
    engine.update_weights()
    assert not captured(engine)
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), engine_of(model, tokenizer).generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("library", ["flash", "flashinfer"])
def test_an_installed_library_reads_pages_with_the_tokens_of_gathered_ones(library, graphs, tokenizer, device):
    if not is_installed(library):
        pytest.skip(f"without {library}")
    shape = ARCHITECTURES["windows"] | {"attn_logit_softcapping": 20.0, "qk_norm": "none", "max_position_embeddings": 1024}
    model = random_decoder(BASE.with_changes(head_dim=64, **shape)).to(device, torch.bfloat16)
    gathered = engine_of(model, tokenizer, paged_attention="gather").generate(PROMPTS, PARAMS)
    engine = engine_of(model, tokenizer, paged_attention=library, block_size=256, cuda_graphs=graphs)
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), gathered, error=0.1, tie=0.1)
    assert bool(engine.core.runner.backend.whole) == (graphs and library == "flash")


def test_where_nothing_is_said_pages_are_not_gathered(tokenizer, device):
    model = wide_decoder("dense").to(device, torch.bfloat16)
    engine = Engine(model, tokenizer, config=EngineConfig(max_num_seqs=4))
    assert not isinstance(engine.core.runner.backend.attention, GatheredAttention)
    assert engine.config.max_num_batched_tokens == 8192
    assert_same_but_for_ties(
        engine.generate(PROMPTS, PARAMS), engine_of(model, tokenizer).generate(PROMPTS, PARAMS), error=0.1, tie=0.1
    )
