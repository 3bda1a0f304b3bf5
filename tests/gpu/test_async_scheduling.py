"""Asynchronous scheduling on a card: the tokens that steps one after the other give, and no wait within a step."""

from __future__ import annotations

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.batch import StepInputs
from bessemer.inference.execution.steps.asynchronous import AsyncSteps
from bessemer.inference.sampling.device_sampler import SampledRows
from bessemer.inference.sampling.sampler import SamplingState, sample_rows
from tests.inference.models import small_decoder
from tests.inference.sampling_kinds import KINDS, VOCAB_SIZE

pytestmark = pytest.mark.gpu

SETTINGS = {
    "gathered": {"paged_attention": "gather"},
    "in place": {"paged_attention": "flex", "cuda_graphs": False, "block_size": 16},
    "captured": {"paged_attention": "flex", "block_size": 16},
}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=20, stop_token_ids=list(range(0, 256, 7))),
    SamplingParams(temperature=0, max_tokens=12, min_tokens=6, presence_penalty=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_answers_are_those_of_steps_one_after_the_other(tokenizer, device, settings):
    found = []
    for scheduling in ("auto", "off"):
        config = EngineConfig(async_scheduling=scheduling, **settings)
        engine = Engine(small_decoder("dense").to(device), tokenizer, config=config)
        assert isinstance(engine.core.strategy, AsyncSteps) == (scheduling == "auto")
        found.append(engine.generate([[7], [9] * 20, [*range(40)], [3, 2, 1]], PARAMS))
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_launched_without_a_wait(tokenizer, device, settings):
    engine = Engine(small_decoder("dense").to(device), tokenizer, config=EngineConfig(**settings))
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, seed=1, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
        SamplingParams(max_tokens=40, ignore_eos=True, temperature=0),
    ]
    for prompt, own in zip(([1, 2], [3]), params, strict=True):
        engine.begin(engine.prepare(prompt, own))
    # kernels are compiled and chosen, and graphs captured
    for _ in range(5):
        engine.step()
    core = engine.core
    step, core._launched = core._launched, None
    torch.cuda.set_sync_debug_mode("error")
    try:
        core._launched = core._launch(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    core._hand_over(step)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_tokens_are_those_that_the_host_chooses(device, settings):
    logits_RV = 3 * torch.randn(24, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    rows, again = (
        [SamplingState(SamplingParams(seed=seed, **settings), prompt=[3, 4], vocab_size=VOCAB_SIZE) for seed in range(24)]
        for _ in range(2)
    )
    inputs, chosen = StepInputs(device), SampledRows(rows)
    inputs.begin()
    chosen.place(inputs.put)
    inputs.copy()
    found = chosen.draw(logits_RV.to(device), torch.empty(0, dtype=torch.int64, device=device)).tolist()
    assert found == [one.token for one in sample_rows(logits_RV, again)]
