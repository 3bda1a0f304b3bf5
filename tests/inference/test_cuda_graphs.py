"""Steps of one token each on static tensors, beside the same steps on tensors of their own size."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bessemer.inference.engine import EngineConfig
from bessemer.inference.execution import build as execution_build
from bessemer.inference.execution.build import PageLayout, page_layout
from bessemer.inference.execution.cuda_graphs import StaticSteps, cannot_be_static, sizes_up_to
from bessemer.inference.execution.flex_attention import FlexPagesAttention
from tests.inference.listed_attention import listed_attention
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.inference.steps import Steps, by_modules
from tests.inference.test_identity import WAYS, alone, assert_same_but_for_ties
from tests.model.randomised import random_decoder, random_tokens

STATIC = [name for name in ARCHITECTURES if name != "linear"]


class Repeated:
    """What a CUDA graph does that a processor can show: it captures the computation once, and writes where it wrote then."""

    def __init__(self):
        self.rows = []

    def __call__(self, compute):
        out_BV = compute()
        self.rows.append(len(out_BV))
        return lambda: out_BV.copy_(compute())


def static_runner(decoder, memory, rows=8, capture=None):
    static = StaticSteps(
        decoder, memory, rows, FlexPagesAttention(memory, listed_attention, decoder.dtype), capture or Repeated()
    )
    return by_modules(decoder, memory, flex=listed_attention, static=static)


def prompts_then(steps, rows, *decoding):
    """Prompts of 21, 8 and 40 tokens, then so many texts' next tokens at a time; logits of the latter."""
    lengths = [21, 8, 40]
    steps(*[(text, rows[text], 0, length) for text, length in enumerate(lengths)])
    found = []
    for texts in decoding:
        found += steps(*[(text, rows[text], lengths[text], lengths[text] + 1) for text in texts])
        for text in texts:
            lengths[text] += 1
    return torch.cat(found)


DECODING = [(0, 1, 2), (1,), (2, 0), (0, 1, 2), (1, 2)]


@pytest.mark.parametrize("name", STATIC)
def test_rows_filled_up_to_a_size_give_what_they_give_alone(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    steps = Steps(decoder, static_runner, by_head=True, spare=True)
    found = prompts_then(steps, rows, *DECODING)
    expected = prompts_then(Steps(decoder, partial(by_modules, flex=listed_attention), by_head=True), rows, *DECODING)
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", STATIC)
def test_rows_of_nobody_write_into_the_spare_page_only(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    steps = Steps(decoder, static_runner, by_head=True, spare=True)
    for pages in steps.memory.layers.values():
        pages.keys.fill_(7)
        pages.values.fill_(7)
    prompts_then(steps, rows, *DECODING)
    for index, group in enumerate(steps.memory.groups):
        held = {block for tables in steps.tables.values() for block in tables[index]}
        others = sorted(set(range(160)) - held)
        for layer in group.layers:
            assert (steps.memory.layers[layer].keys[others] == 7).all()
            assert (steps.memory.layers[layer].keys[160] != 7).any()


@pytest.mark.parametrize("name", STATIC)
def test_what_is_not_finite_in_the_spare_page_harms_nobody(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    found = []
    for left in (0.0, torch.nan):
        steps = Steps(decoder, static_runner, by_head=True, spare=True)
        for pages in steps.memory.layers.values():
            pages.keys[160] = pages.values[160] = left
        found.append(prompts_then(steps, rows, *DECODING))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_logits_of_a_step_outlive_the_next():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 2, 20)
    steps = Steps(decoder, static_runner, by_head=True, spare=True)
    first = steps((0, rows[0], 0, 1), (1, rows[1], 0, 1))
    kept = torch.cat(first).clone()
    steps((0, rows[0], 1, 2), (1, rows[1], 1, 2))
    assert torch.equal(torch.cat(first), kept)


def test_every_size_is_captured_once_and_the_largest_first():
    decoder, capture = small_decoder("dense"), Repeated()
    rows = random_tokens(decoder.config, 3, 60)
    steps = Steps(decoder, partial(static_runner, rows=6, capture=capture), by_head=True, spare=True)
    prompts_then(steps, rows, *DECODING)
    assert capture.rows == [6, 4, 2, 1]


def test_sizes_are_powers_of_two_and_the_most_that_run():
    assert [sizes_up_to(rows) for rows in (1, 2, 6, 64)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64]]


def test_steps_with_prompts_guesses_or_adapters_are_not_static():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 2, 20)
    steps = Steps(decoder, static_runner, by_head=True, spare=True)
    taken = []
    steps.runner.backend.whole.takes = lambda batch: taken.append(StaticSteps.takes(steps.runner.backend.whole, batch)) or []
    steps((0, rows[0], 0, 4), (1, rows[1], 0, 1))
    steps((0, rows[0], 4, 5), (1, rows[1], 1, 3), drafts=[0, 1])
    steps((0, rows[0], 5, 6), (1, rows[1], 2, 3))
    assert [len(sequences) for sequences in taken] == [0, 0, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [(ARCHITECTURES["linear"], "linear attention"), ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic")],
)
def test_models_whose_steps_hang_on_the_host_are_not_static(changes, reason):
    assert reason in cannot_be_static(random_decoder(BASE.with_changes(**changes)))


def test_weights_that_moved_are_captured_anew():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 20)
    steps = Steps(decoder, static_runner, by_head=True, spare=True)
    steps((0, rows[0], 0, 1))
    static = steps.runner.backend.whole
    decoder.norm.weight.data.mul_(2)
    steps.runner.weights_changed()
    assert static._steps
    decoder.norm.weight.data = decoder.norm.weight.data.clone()
    steps.runner.weights_changed()
    assert not static._steps


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("static"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) == ("windows", "preempted for want of pages") else pytest.mark.slow)
        for name in STATIC
        for way in WAYS
    ],
)
def test_an_engine_on_static_tensors_makes_the_same_tokens_but_for_ties(name, way, tokenizer, monkeypatch):
    monkeypatch.setattr(execution_build, "compiled_page_attention", lambda: listed_attention)
    monkeypatch.setattr(execution_build, "page_layout", lambda *_: PageLayout(True, True))
    monkeypatch.setattr(execution_build, "paged_way", lambda *_: "flex")
    capture = Repeated()
    monkeypatch.setattr(execution_build, "CudaGraphs", lambda: capture)
    model = small_decoder(name)
    found = WAYS[way](model, tokenizer)
    assert capture.rows
    monkeypatch.undo()
    for one, other in zip(found, alone(model, tokenizer), strict=True):
        assert_same_but_for_ties(one, other)


def test_no_page_is_spared_on_a_processor():
    assert page_layout(small_decoder("dense"), EngineConfig(paged_attention="flex"), torch.float32) == (True, False)
