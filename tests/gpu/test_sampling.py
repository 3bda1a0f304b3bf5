"""Tokens chosen from logits that lie on a card: the ones that are chosen from the same logits on the processor."""

from __future__ import annotations

import math

import pytest
import torch

from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inference.sampling.distribution import log_probs
from bessemer.inference.sampling.sampler import SamplingState, choose, likeliest, sample_rows
from bessemer.inference.speculation.proposer import Draft
from bessemer.inference.speculation.verification import verify_rows
from tests.inference.models import small_decoder

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 500
PARAMS = {
    "the likeliest": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.4, "temperature": 0.5},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.5},
    "biases and bans": {"logit_bias": {3: 4.0, 7: -5.0}, "banned_tokens": [1, 2]},
    "all of them": {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5},
}


def random_logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def states(params, count):
    """Requests that have made some tokens already."""
    made = [SamplingState(params, prompt=[3, 4, 5], vocab_size=VOCAB_SIZE, index=index) for index in range(count)]
    for index, state in enumerate(made):
        for token in (index, index, 5, 6):
            state.advance(token)
    return made


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_the_tokens_chosen_are_those_of_the_processor(settings, device):
    logits_RV, rows = random_logits(40), states(SamplingParams(seed=1, **settings), 40)
    numbers = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    assert choose(logits_RV.to(device), rows, numbers) == choose(logits_RV, rows, numbers)


def test_draws_follow_the_softmax(device):
    """Pearson's χ² of 20,000 draws lies within 4 standard deviations of its mean."""
    logits_V = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0])
    draws = 20_000
    state = SamplingState(SamplingParams(temperature=0.8, seed=3), prompt=[0], vocab_size=len(logits_V))
    tokens = [one.token for one in sample_rows(logits_V.to(device).expand(draws, -1), [state] * draws)]
    observed_V = torch.tensor(tokens).bincount(minlength=len(logits_V)).double()
    expected_V = (logits_V.double() / 0.8).softmax(-1) * draws
    statistic, degrees = ((observed_V - expected_V) ** 2 / expected_V).sum().item(), len(logits_V) - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_a_seed_gives_the_same_text_again_and_another_does_not(tokenizer, device):
    engine = Engine(small_decoder("dense").to(device), tokenizer)
    params = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    first, again, other = (
        [one.token_ids for one in engine.generate([[7], [8, 9]], params.with_changes(seed=seed))] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_of_equal_logits_the_first_is_the_likeliest(device):
    logits_RV = torch.zeros(3, VOCAB_SIZE)
    logits_RV[1, [40, 9, 300]] = 2.0
    logits_RV[2, 5] = torch.nan
    assert likeliest(logits_RV.to(device)) == likeliest(logits_RV) == [0, 9, -1]


def test_log_probabilities_are_those_of_the_processor(device):
    logits_RV = random_logits(40)
    found, expected = (log_probs(logits_RV.to(where), [5] * 40, [3] * 40) for where in (device, "cpu"))
    for one, other in zip(found, expected, strict=True):
        assert one.token == pytest.approx(other.token, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5}, {"repetition_penalty": 1.4}], ids=str
)
def test_guesses_are_checked_as_on_the_processor(settings, device):
    logits_RV = random_logits(12)
    likely = logits_RV.argmax(-1).tolist()
    drafts = [Draft(likely[:3]), Draft([likely[4], 0, 0]), Draft(likely[8:11])]
    found, expected = (
        verify_rows(logits_RV.to(where), states(SamplingParams(seed=1, **settings), 3), drafts) for where in (device, "cpu")
    )
    assert found == expected and max(map(len, found)) > 1


def test_drawn_guesses_are_checked_as_on_the_processor(device):
    logits_RV, draft_RV = random_logits(8), random_logits(8).mul(0.8).softmax(-1)
    tokens = [draft_RV[row].argmax().item() for row in range(8)]
    params = SamplingParams(seed=1, temperature=0.9)
    found, expected = (
        verify_rows(
            logits_RV.to(where),
            states(params, 2),
            [Draft(tokens[:3], draft_RV[:3].to(where)), Draft(tokens[4:7], draft_RV[4:7].to(where))],
        )
        for where in (device, "cpu")
    )
    assert found == expected and max(map(len, found)) > 1
