from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.sampler import SamplingParams, sample_rows, truncated_logits
from bessemer.inference.speculation.proposer import Draft
from bessemer.inference.speculation.verification import propose, verify, verify_rows
from tests.cases import in_turn, slow_but
from tests.inference.test_rows import chi_square_is_plausible, state

VOCAB = 7


def logits_after(tokens):
    """A model of 7 tokens whose distribution depends on all tokens before."""
    return _logits_after(tuple(tokens)).clone()


@cache
def _logits_after(tokens):
    seed = sum((place + 1) * (token + 3) for place, token in enumerate(tokens))
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def target(answer, draft):
    return torch.stack([logits_after([*answer, *draft[:count]]) for count in range(len(draft) + 1)])


def answer_without_speculation(length, **settings):
    row = state(VOCAB, **settings)
    while len(row.answer) < length:
        sample_rows(logits_after(row.answer)[None], [row])
    return row.answer


def answer_with(drafter, length, **settings):
    """An answer made with a drafter: from the answer to (draft, its distributions or None)."""
    row = state(VOCAB, **settings)
    while len(row.answer) < length:
        draft, probabilities = drafter(row)
        verify(target(row.answer, draft), row, draft, probabilities)
    return row.answer[:length]


def answers_of_many(drafter, count, length, **settings):
    """Answers with the seeds 0, 1, …, all rows in one step."""
    rows = [state(VOCAB, seed=seed, **settings) for seed in range(count)]
    while growing := [row for row in rows if len(row.answer) < length]:
        if drafter is None:
            sample_rows(torch.stack([logits_after(row.answer) for row in growing]), growing)
        else:
            drafts = [Draft(*drafter(row)) for row in growing]
            targets = [target(row.answer, draft.tokens) for row, draft in zip(growing, drafts, strict=True)]
            verify_rows(torch.cat(targets), growing, drafts)
    return [row.answer[:length] for row in rows]


def fixed_draft(row):
    return [(len(row.answer) * 5 + step) % VOCAB for step in range(3)], None


def wrong_then_right_draft(row):
    """The likeliest tokens, so that drafts are often accepted."""
    tokens = list(row.answer)
    for _ in range(3):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(row.answer) :], None


def model_draft(row):
    """Drawn from another model: the first one's logits, blurred."""
    tokens, distributions = list(row.answer), []
    for _ in range(2):
        logits_V = 0.5 * logits_after(tokens) + 0.5 * logits_after([9, *tokens])
        (token,), (distribution_V,) = propose(logits_V[None], [row])
        tokens.append(token)
        distributions.append(distribution_V)
    return tokens[len(row.answer) :], None if distributions[0] is None else torch.stack(distributions)


DRAFTERS = [fixed_draft, wrong_then_right_draft, model_draft]
SETTINGS = [
    {},
    {"temperature": 0.6, "top_k": 4},
    {"top_p": 0.8},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"min_tokens": 2, "banned_tokens": [5]},
]


@pytest.mark.parametrize("settings", [{}, *SETTINGS[3:]])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_answers_are_those_without_speculation(drafter, settings):
    settings = settings | {"temperature": 0, "end_tokens": []}
    assert answer_with(drafter, 40, **settings) == answer_without_speculation(40, **settings)


@pytest.mark.parametrize(("drafter", "settings"), in_turn([fixed_draft, wrong_then_right_draft], SETTINGS))
def test_with_drafts_that_are_not_drawn_the_same_seed_gives_the_same_answer(drafter, settings):
    for seed in range(5):
        expected = answer_without_speculation(30, seed=seed, end_tokens=[], **settings)
        assert answer_with(drafter, 30, seed=seed, end_tokens=[], **settings) == expected


def distribution_of_three(settings):
    """The exact distribution of an answer's first three tokens, in the order of base-7 numbers."""
    shares = np.zeros(VOCAB**3)
    for tokens in itertools.product(range(VOCAB), repeat=3):
        share = 1.0
        for count, token in enumerate(tokens):
            changed = logits_after(tokens[:count])
            state(VOCAB, answer=tokens[:count], **settings).adjust(changed.numpy())
            share *= (
                truncated_logits(changed[None], SamplingParams(**settings_of(settings))).double().softmax(-1)[0, token].item()
            )
            if share == 0:
                break
        shares[tokens[0] * 49 + tokens[1] * 7 + tokens[2]] = share
    return torch.from_numpy(shares)


def settings_of(settings):
    return {name: value for name, value in settings.items() if name != "end_tokens"}


#: Tested on every run: each drafter, and each setting, once.
DISTRIBUTIONS = [
    (None, SETTINGS[1]),
    # drafts of a model: `test_draft_model.py`
    *((wrong_then_right_draft, settings) for settings in (SETTINGS[0], SETTINGS[2], SETTINGS[4])),
]


@pytest.mark.parametrize(
    ("drafter", "settings"),
    slow_but(DISTRIBUTIONS, itertools.product([None, wrong_then_right_draft, model_draft], SETTINGS)),
)
def test_answers_follow_the_models_distribution(drafter, settings):
    settings = settings | {"end_tokens": [0] if "min_tokens" in settings else []}
    # an end token ends the draft's use, not this test's answer: what follows it is drawn as anything else
    draws = answers_of_many(drafter, 1_000, 3, **settings)
    numbers = [first * 49 + second * 7 + third for first, second, third in draws]
    assert chi_square_is_plausible(numbers, distribution_of_three(settings))


def test_a_draft_equal_to_the_target_is_always_accepted():
    row = state(VOCAB, seed=4, end_tokens=[])
    draft = [3, 1, 2]
    probabilities_dV = target([], draft)[:3].softmax(-1)
    assert [token.token for token in verify(target([], draft), row, draft, probabilities_dV)][:3] == draft


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_each_token_takes_one_number(drafter):
    row = state(VOCAB, seed=6, end_tokens=[])
    draft, probabilities = drafter(row)
    row = state(VOCAB, seed=6, end_tokens=[])
    made = verify(target([], draft), row, draft, probabilities)
    expected = torch.Generator().manual_seed(6)
    torch.rand(len(made), dtype=torch.float64, generator=expected)
    assert torch.equal(row.generator.get_state(), expected.get_state())


@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
def test_nothing_follows_an_accepted_end_token(drawn):
    logits_PV = torch.full((4, VOCAB), -20.0)
    logits_PV[[0, 1, 2, 3], [2, 0, 3, 4]] = 20.0
    row = state(VOCAB, temperature=float(drawn), end_tokens=[0])
    probabilities_dV = torch.eye(VOCAB)[[2, 0, 3]] if drawn else None
    assert [token.token for token in verify(logits_PV, row, [2, 0, 3], probabilities_dV)] == [2, 0]
    assert row.answer == [2, 0]


def test_log_probs_are_given_for_each_token():
    draft = wrong_then_right_draft(state(VOCAB))[0]
    row = state(VOCAB, temperature=0, logprobs=1, end_tokens=[])
    made = verify(target([], draft), row, draft)
    assert len(made) == 4
    for place, token in enumerate(made):
        expected_V = target([], draft)[place].log_softmax(-1)
        assert token.log_probs.token == expected_V[token.token].item() == token.log_probs.top[0][1]


def test_damaged_logits_of_a_later_position_keep_what_is_accepted():
    logits_PV = torch.zeros(3, VOCAB)
    logits_PV[0, 4], logits_PV[1, 0] = 9.0, math.nan
    row = state(VOCAB, temperature=0, end_tokens=[])
    assert [token.token for token in verify(logits_PV, row, [4, 4])] == [4]
    with pytest.raises(RequestError, match="not finite"):
        verify(logits_PV[1:], row, [4])
    assert row.answer == [4]


TOGETHER = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 3, "logprobs": 2},
    {"repetition_penalty": 1.4, "logprobs": 1},
    {"temperature": 0, "presence_penalty": 0.8},
    {"top_p": 0.8, "banned_tokens": [5]},
    {"min_tokens": 3, "end_tokens": [0]},
    {},
]


@pytest.mark.parametrize("drafter", [*DRAFTERS, lambda row: ([], None)])
def test_a_request_gets_beside_others_what_it_gets_alone(drafter):
    for seed in range(8):
        together, alone = ([state(VOCAB, seed=seed, **{"end_tokens": []} | settings) for settings in TOGETHER] for _ in "ab")
        drafts = [Draft(*drafter(row)) for row in together]
        for row in alone:  # a drawn draft has taken numbers
            drafter(row)
        drafts[seed % len(drafts)] = Draft()
        targets = [target([], draft.tokens) for draft in drafts]
        found = verify_rows(torch.cat(targets), together, drafts)
        for place, (row, draft, logits_PV) in enumerate(zip(alone, drafts, targets, strict=True)):
            assert found[place] == verify(logits_PV, row, draft.tokens, draft.probabilities_dV)
            if not draft.tokens:
                (only,) = sample_rows(logits_PV, [state(VOCAB, seed=seed, **{"end_tokens": []} | TOGETHER[place])])
                assert drafter is model_draft or found[place] == [only]
            assert together[place].answer == row.answer == [one.token for one in found[place]]
            assert torch.equal(together[place].generator.get_state(), row.generator.get_state())


def test_a_request_that_gets_no_token_leaves_those_beside_it():
    logits_RV = torch.zeros(5, VOCAB)
    logits_RV[0], logits_RV[3, 2], logits_RV[4, 6] = math.nan, 9.0, 9.0
    rows = [state(VOCAB, temperature=temperature, seed=1) for temperature in (0, 0.1)]
    refused, made = verify_rows(logits_RV, rows, [Draft([1, 1]), Draft([2])])
    assert isinstance(refused, RequestError) and rows[0].answer == []
    assert [one.token for one in made] == [2, 6] == rows[1].answer
