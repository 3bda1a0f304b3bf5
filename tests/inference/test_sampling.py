from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.sampling.penalties import TokenCounts
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState, generator_for, sample_rows, truncated_logits
from tests.cases import slow_but

#: A dozen tokens, two of them equal.
LOGITS_V = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -9.0])


@given(
    st.lists(st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.3, 1.0, 2.5, 6.0]), min_size=7, max_size=7), min_size=1, max_size=4),
    st.floats(0.1, 3),
    st.integers(0, 9),
    st.floats(1e-12, 1),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.one_of(st.just(1.0), st.floats(1e-6, 1)),
)
@settings(max_examples=60, deadline=None)
def test_truncation_is_that_of_transformers(rows, temperature, top_k, top_p, min_p, typical_p):
    logits_BV = torch.tensor(rows)
    expected_BV = TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k:
        expected_BV = TopKLogitsWarper(top_k)(None, expected_BV)
    if top_p < 1:
        shares_BV = expected_BV.softmax(-1).sort(-1).values.cumsum(-1)
        assume((shares_BV - (1 - top_p)).abs().min() > 1e-6)  # where rounding decides, one more may stay
        expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    if min_p:
        expected_BV = MinPLogitsWarper(min_p)(None, expected_BV)
    if typical_p < 1:
        assume(typical_is_clear(expected_BV, typical_p))
        expected_BV = TypicalLogitsWarper(typical_p)(None, expected_BV)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    assert torch.equal(truncated_logits(logits_BV, params), expected_BV)


def typical_is_clear(logits_BV, mass):
    """Whether rounding cannot decide what stays: no share near the mass, no two unequal tokens equally far from the entropy."""
    log_probs_BV = logits_BV.double().log_softmax(-1)
    entropy_B1 = -(log_probs_BV.exp() * log_probs_BV).nansum(-1, keepdim=True)
    distances_BV, order_BV = (-log_probs_BV - entropy_B1).abs().sort(-1)
    shares_BV = log_probs_BV.exp().gather(-1, order_BV).cumsum(-1)
    gaps = distances_BV.diff(dim=-1)[:, :]
    near = (gaps < 1e-5) & (log_probs_BV.gather(-1, order_BV).diff(dim=-1).abs() > 1e-9)
    return bool((shares_BV - mass).abs().min() > 1e-6) and not near.any()


def sample(logits_BV, params, generators):
    """A token for each row, drawn with these sources of numbers. Raises what a row is refused with."""
    rows = [SamplingState(params, prompt=[0], vocab_size=logits_BV.shape[-1]) for _ in logits_BV]
    for row, generator in zip(rows, generators, strict=False):
        row.generator = generator
    found = sample_rows(logits_BV.float(), rows)
    for one in found:
        if isinstance(one, RequestError):
            raise one
    return [one.token for one in found]


def test_the_likeliest_stays_whatever_top_p():
    (token,) = sample(LOGITS_V[None], SamplingParams(top_p=1e-12), [torch.Generator()])
    assert token == 0


def test_temperature_0_takes_the_likeliest():
    logits_BV = torch.stack([LOGITS_V, LOGITS_V.flip(0)])
    assert sample(logits_BV, SamplingParams(temperature=0), []) == [0, 11]


DRAWING = [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}]


@pytest.mark.parametrize("settings_", slow_but([{"temperature": 2.0}, {"top_k": 6, "top_p": 0.7}], DRAWING))
def test_draws_follow_the_distribution(settings_):
    params, draws = SamplingParams(**settings_), 8_000
    tokens = sample(LOGITS_V.expand(draws, -1), params, [torch.Generator().manual_seed(3)] * draws)
    observed_V = torch.tensor(tokens).bincount(minlength=12).double()
    expected_V = truncated_logits(LOGITS_V[None], params).softmax(-1)[0].double() * draws
    assert observed_V[expected_V == 0].sum() == 0
    possible_V = expected_V >= 5  # Pearson's statistic is not chi-square where less is expected
    observed_V, expected_V = observed_V[possible_V], expected_V[possible_V]
    statistic = ((observed_V - expected_V) ** 2 / expected_V).sum().item()
    degrees = int(possible_V.sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("logits", [[-torch.inf, 0.0, 0.0, -torch.inf], [-torch.inf, 0.1, -7.3, 1.7, -torch.inf]])
def test_a_token_of_probability_0_is_never_drawn(monkeypatch, uniform, logits):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    (token,) = sample(torch.tensor([logits]), SamplingParams(), [torch.Generator()])
    assert math.isfinite(logits[token])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    params = SamplingParams(seed=5)
    alone = sample(LOGITS_V[None], params, [generator_for(params)])
    beside = sample(torch.stack([LOGITS_V.flip(0), LOGITS_V]), params, [torch.Generator(), generator_for(params)])
    assert beside[1:] == alone


@pytest.mark.parametrize("seed", [0, -1, 2**63, 10**30])
def test_the_same_seed_gives_the_same_numbers(seed):
    drawn = [torch.rand(4, generator=generator_for(SamplingParams(seed=seed))) for _ in range(2)]
    assert torch.equal(*drawn)


def test_without_a_seed_the_numbers_differ():
    assert not torch.equal(*(torch.rand(4, generator=generator_for(SamplingParams())) for _ in range(2)))


def test_logits_that_are_not_finite_are_reported():
    with pytest.raises(RequestError, match="not finite"):
        sample(torch.tensor([[0.0, math.nan]]), SamplingParams(), [torch.Generator()])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: input should be greater than or equal to 0, got -1"),
        ({"temperature": -0.1}, "temperature: input should be greater than or equal to 0"),
        ({"temperature": math.inf}, "temperature: input should be a finite number"),
        ({"top_k": -1}, "top_k: input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p: input should be greater than 0"),
        ({"top_p": 1.1}, "top_p: input should be less than or equal to 1"),
        ({"stop": [""]}, "stop.0: string should have at least 1 character"),
        ({"min_p": 1.5}, "min_p: input should be less than or equal to 1, got 1.5"),
        ({"typical_p": 0}, "typical_p: input should be greater than 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: input should be greater than 0"),
        ({"presence_penalty": 2.5}, "presence_penalty: input should be less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty: input should be greater than or equal to -2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: input should be less than or equal to 100"),
        ({"logit_bias": {-1: 1}}, "input should be greater than or equal to 0"),
        ({"allowed_tokens": []}, "allowed_tokens: list should have at least 1 item"),
        ({"allowed_tokens": [3], "banned_tokens": [2, 3]}, "no token is left"),
        ({"stop_token_ids": [-2]}, "stop_token_ids.0: input should be greater than or equal to 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens (9) is above max_tokens (8)"),
        ({"n": 0}, "n: input should be greater than or equal to 1"),
        ({"n": 3, "best_of": 2}, "best_of (2) is below n (3)"),
        ({"logprobs": -1}, "logprobs: input should be greater than or equal to 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: input should be greater than or equal to 0"),
        ({"length_penalty": math.nan}, "length_penalty: input should be a finite number"),
        ({"beam_width": 2, "n": 3}, "n (3) is above beam_width (2)"),
        ({"beam_width": 2, "top_k": 5}, "beam search does not take top_k"),
        ({"beam_width": 2, "stop": ["a"]}, "beam search does not take stop"),
        ({"beam_width": 2, "regex": "a"}, "beam search does not take regex"),
        ({"beam_width": 2, "temperature": 0.5}, "beam search draws nothing"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice cannot be asked together"),
        ({"choice": []}, "choice: list should have at least 1 item"),
        ({"logits_processor": "mine"}, "logits_processor: must be a function, or one of a file as file.py:function"),
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SamplingParams.parse(values, "generate")


def test_tokens_are_counted_once_in_what_is_present_and_as_often_as_they_were_made():
    prompt, made = [5, 3, 5, 900], [3, 7, *range(40), 7, 7]
    counts = TokenCounts(prompt)
    for number, token in enumerate(made, start=1):
        counts.add(token)
        expected = Counter(made[:number])
        tokens_N, times_N = counts.made
        assert dict(zip(tokens_N.tolist(), times_N.tolist(), strict=True)) == expected
        assert sorted(counts.present.tolist()) == sorted({*prompt, *expected})
