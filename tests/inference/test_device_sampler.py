"""Sampling on the device, and the numbers of a step: the host's tokens, one copy to the device, and no wait."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bessemer.core.config import setting
from bessemer.core.errors import RequestError
from bessemer.inference.execution.batch import StepInputs
from bessemer.inference.sampling.device_sampler import SampledRows, token_problem
from bessemer.inference.sampling.params import Mark, marked
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState, sample_rows
from tests.inference.sampling_kinds import KINDS, VOCAB_SIZE

ROOT = Path(__file__).parents[2]
#: A token that the host does not know yet.
LAST = 6


def states(settings, count, made=(5, LAST)):
    of_all = [
        SamplingState(SamplingParams(seed=seed, **settings), prompt=[3, 4, 5], vocab_size=VOCAB_SIZE) for seed in range(count)
    ]
    for seed, state in enumerate(of_all):
        for token in (seed, seed, *made):
            state.advance(token)
    return of_all


def on_device(logits_RV, rows, pending=None, sampled=()):
    inputs = StepInputs(torch.device("cpu"))
    chosen = SampledRows(rows, pending)
    inputs.begin()
    chosen.place(inputs.put)
    inputs.copy()
    return chosen.draw(logits_RV, torch.tensor(sampled, dtype=torch.int64)).tolist()


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_tokens_are_those_that_the_host_chooses(settings):
    logits_RV = 3 * torch.randn(24, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    # equal logits at the edges of top-k and top-p
    logits_RV[::2] = logits_RV[::2].round()
    before = logits_RV.clone()
    found = on_device(logits_RV, states(settings, 24))
    assert torch.equal(logits_RV, before)
    assert found == [one.token for one in sample_rows(logits_RV, states(settings, 24))]


def test_rows_of_every_kind_are_chosen_together():
    logits_RV = 3 * torch.randn(len(KINDS), VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    rows = [states(settings, 1)[0] for settings in KINDS.values()]
    assert all(state.on_device for state in rows)
    again = [states(settings, 1)[0] for settings in KINDS.values()]
    assert on_device(logits_RV, rows) == [one.token for one in sample_rows(logits_RV, again)]


#: Settings that the device's sampler leaves to the host's, and a value that asks for each.
ON_HOST = {
    "typical_p": 0.9,
    "logits_processor": lambda prompt, answer, logits: logits,
    "logprobs": 0,
    "json_schema": {},
    "regex": "a",
    "choice": ["a"],
    "ebnf": 'start: "a"',
}


def test_a_setting_is_computed_on_the_device_or_read_by_no_sampler_or_left_to_the_host():
    for name in SamplingParams.model_fields:
        kinds = [name in marked(Mark.DEVICE), name in marked(Mark.UNREAD), name in ON_HOST]
        assert sum(kinds) <= 1, name


def test_every_setting_that_the_device_computes_is_compared_with_the_host():
    compared = {name for settings in KINDS.values() for name in settings} | {"seed"}
    assert compared == set(marked(Mark.DEVICE))


@pytest.mark.parametrize("name", ON_HOST)
def test_what_the_device_does_not_compute_is_sampled_on_the_host(name):
    params = SamplingParams(**{name: ON_HOST[name]})
    grammar = SimpleNamespace(finished=False) if params.grammar else None
    assert not SamplingState(params, prompt=[3], vocab_size=VOCAB_SIZE, grammar=grammar).on_device


def test_a_setting_that_nobody_has_classified_is_sampled_on_the_host():
    class Newer(SamplingParams):
        top_a: float = setting(0.0, "a setting to come")

    assert SamplingState(Newer(), prompt=[3], vocab_size=VOCAB_SIZE).on_device
    assert not SamplingState(Newer(top_a=0.2), prompt=[3], vocab_size=VOCAB_SIZE).on_device


@pytest.mark.parametrize("name", ["repetition", "presence and frequency", "ends too early"])
def test_a_token_that_only_the_device_knows_counts(name):
    logits_RV = 2 * torch.randn(24, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    # near enough to the likeliest for a penalty to decide
    logits_RV[:, LAST] = logits_RV.amax(-1) + 0.3
    # the tokens made are one too few for the end, with the last one they are not
    settings = {**KINDS[name], "temperature": 0} | ({"min_tokens": 4} if name == "ends too early" else {})
    pending = {row: 23 - row for row in range(24)}
    found = on_device(logits_RV, states(settings, 24, made=[5]), pending, [LAST] * 24)
    assert found == [one.token for one in sample_rows(logits_RV, states(settings, 24))]


def test_a_row_that_gives_no_token_says_why_and_harms_no_other():
    logits_RV = torch.zeros(4, VOCAB_SIZE)
    logits_RV[0, 5] = torch.nan
    logits_RV[1] = -torch.inf
    logits_RV[2, 9] = torch.inf
    for settings in (KINDS["greedy"], KINDS["all of them"]):
        *wrong, right = on_device(logits_RV, states(settings, 4))
        assert [str(token_problem(token)) for token in wrong] == [
            str(one) for one in sample_rows(logits_RV, states(settings, 4))[:3] if isinstance(one, RequestError)
        ]
        assert right >= 0 and token_problem(right) is None


@pytest.mark.slow
def test_a_step_is_copied_to_the_device_at_once_and_nothing_waits_for_it():
    """On a pretended device, whose tensors have no numbers that anyone could wait for."""
    run = [sys.executable, "-m", "tests.inference.pretended_device"]
    done = subprocess.run(run, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    copies = json.loads(done.stdout)
    assert len(copies) == 5 and all(counts == [1, 1] for counts in copies.values()), copies


def test_inputs_that_outgrow_a_buffer_are_all_copied():
    inputs = StepInputs(torch.device("cpu"))
    for count in (3, 100_000, 5):
        inputs.begin()
        tensors = [inputs.put(np.full(count, number)) for number in range(4)]
        inputs.copy()
        assert [tensor.tolist() for tensor in tensors] == [[number] * count for number in range(4)]
    first = inputs.put([1]).data_ptr()
    inputs.begin()
    assert inputs.put([1]).data_ptr() != first
