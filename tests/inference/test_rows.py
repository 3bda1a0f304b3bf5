"""Many requests in one batch, each with settings of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.sampling.distribution import Truncation, candidates, draw, largest
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState, sample_rows, truncated_logits
from tests.cases import slow_but

VOCAB = 700  # more than one block, and a rest


def random_logits(rows, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def state(vocab=VOCAB, prompt=(1, 2, 3), end_tokens=(0,), answer=(), index=0, folder=None, **params):
    made = SamplingState(
        SamplingParams(**params), prompt=prompt, vocab_size=vocab, end_tokens=end_tokens, index=index, folder=folder
    )
    for token in answer:
        made.advance(token)
    return made


def adjusted(logits_V, **settings):
    changed = logits_V.clone()
    state(vocab=len(logits_V), **settings).adjust(changed.numpy())
    return changed


def chi_square_is_plausible(tokens, probabilities_V):
    observed_V = torch.tensor(tokens).bincount(minlength=len(probabilities_V)).double()
    expected_V = probabilities_V.double() * len(tokens)
    assert observed_V[expected_V == 0].sum() == 0
    possible_V = expected_V >= 5
    observed_V = torch.cat([observed_V[possible_V], observed_V[~possible_V].sum()[None]])
    expected_V = torch.cat([expected_V[possible_V], expected_V[~possible_V].sum()[None]])
    statistic = ((observed_V - expected_V) ** 2 / expected_V.clamp(min=1e-9)).sum().item()
    degrees = max(int(possible_V.sum()) - 1, 1)
    return statistic < degrees + 5 * math.sqrt(2 * degrees)


MIXED = [
    {"temperature": 0},
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 5, "logit_bias": {9: 0.5}},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.8, "temperature": 1.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"typical_p": 0.7},
    {"repetition_penalty": 1.3, "temperature": 0},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {7: 5.0}, "top_k": 3},
    {"allowed_tokens": [3, 4, 699]},
    {"banned_tokens": [1, 2], "min_tokens": 4},
    {"logprobs": 3},
    {"top_p": 0.9, "logprobs": 0, "logprobs_mode": "temperature"},
    {"top_p": 0.9, "logprobs": 0, "logprobs_mode": "sampled"},
    {"top_p": 0.9, "logprobs": 2, "logprobs_mode": "sampled"},
    {"top_k": 5, "logprobs": 0, "logprobs_mode": "temperature"},
]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_what_it_gets_alone(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # a vocabulary large enough that PyTorch would split a sum over it between threads
        logits_RV = random_logits(len(MIXED), 40_000)
        logits_RV[3, :20] = logits_RV[3].max() + 1  # more than k equal ones at the edge
        together = [state(40_000, seed=5, answer=[8, 8, 9], **settings) for settings in MIXED]
        alone = [state(40_000, seed=5, answer=[8, 8, 9], **settings) for settings in MIXED]
        order = np.random.default_rng(1).permutation(len(MIXED))
        of_all = sample_rows(logits_RV[order], [together[row] for row in order])
        for place, row in enumerate(order):
            assert of_all[place] == sample_rows(logits_RV[row : row + 1], [alone[row]])[0], MIXED[row]
    finally:
        torch.set_num_threads(before)


DRAWING = [settings for settings in MIXED if settings.get("temperature") != 0 and "logprobs" not in settings]
#: Temperature, top-k and a bias alone: other settings have them too, in company.
ALONE = [{"temperature": 0.7}, {"top_k": 5}, {"top_k": 5, "logit_bias": {9: 0.5}}, {"top_k": 1}]


@pytest.mark.parametrize("settings_", slow_but([settings for settings in DRAWING if settings not in ALONE][::3], DRAWING))
def test_draws_of_a_large_vocabulary_follow_the_distribution(settings_):
    logits_V = random_logits(1)[0]
    drawn = sample_rows(logits_V.expand(3_000, -1), [state(answer=[8, 8, 9], seed=seed, **settings_) for seed in range(3_000)])
    expected_V = truncated_logits(adjusted(logits_V, answer=[8, 8, 9], **settings_)[None], SamplingParams(**settings_)).softmax(
        -1
    )
    assert chi_square_is_plausible([row.token for row in drawn], expected_V[0])


def test_a_tie_at_the_edge_of_top_k_leaves_the_other_rows_bits():
    logits_BV, temperatures_B = random_logits(3, 5_000), torch.tensor([1.0, 0.7, 0.9])
    logits_BV[1, :20] = logits_BV[1].max() + 1
    truncation = Truncation.of(SamplingParams(top_k=5, top_p=0.9))
    together = {
        row: part.weights_BN[place]
        for rows, part in candidates(logits_BV, temperatures_B, truncation)
        for place, row in enumerate(rows)
    }
    for row in range(3):
        ((_, alone),) = candidates(logits_BV[row : row + 1], temperatures_B[row : row + 1], truncation)
        assert torch.equal(together[row], alone.weights_BN[0])
    assert [len(together[row]) for row in range(3)] == [5, 5_000, 5]


@pytest.mark.parametrize("settings_", [{}, {"top_k": 9}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0}])
def test_a_row_takes_one_number_of_its_generator_or_none_when_greedy(settings_):
    row, expected = state(seed=3, **settings_), torch.Generator().manual_seed(3)
    sample_rows(random_logits(1), [row])
    if not row.params.greedy:
        torch.rand(1, dtype=torch.float64, generator=expected)
    assert torch.equal(row.generator.get_state(), expected.get_state())


@given(st.lists(st.integers(0, 6), max_size=8), st.lists(st.integers(0, 6), max_size=8), st.floats(0.2, 4), st.integers(0, 99))
@settings(deadline=None)
def test_repetition_penalty_and_bias_are_those_of_transformers(prompt, answer, penalty, seed):
    logits_V = random_logits(1, 7, seed)[0]
    theirs = LogitsProcessorList([SequenceBiasLogitsProcessor([[[2], 1.5]]), RepetitionPenaltyLogitsProcessor(penalty)])
    expected_V = theirs(torch.tensor([[*prompt, *answer]], dtype=torch.int64), logits_V[None].clone())[0]
    ours_V = adjusted(logits_V, prompt=prompt, answer=answer, repetition_penalty=penalty, logit_bias={2: 1.5})
    assert torch.equal(ours_V, expected_V)


def test_presence_and_frequency_penalties_count_the_answer_alone():
    changed = adjusted(torch.zeros(6), prompt=[1, 2], answer=[2, 3, 3], presence_penalty=0.5, frequency_penalty=0.25)
    assert changed.tolist() == [0, 0, -0.75, -1.0, 0, 0]


def test_counts_hold_for_many_different_tokens():
    answer = [*range(60), *range(30)]
    changed = adjusted(torch.zeros(80), prompt=[], answer=answer, frequency_penalty=1.0, repetition_penalty=2.0)
    assert changed.tolist() == [-2.0] * 30 + [-1.0] * 30 + [0.0] * 20


def test_allowed_and_banned_tokens_leave_the_rest_out():
    changed = adjusted(torch.arange(5.0), allowed_tokens=[1, 2, 3], banned_tokens=[2])
    assert changed.tolist() == [-math.inf, 1, -math.inf, 3, -math.inf]


def test_no_end_before_min_tokens():
    logits_V = torch.tensor([9.0, 1.0, 8.0, 0.0])
    row = state(4, temperature=0, min_tokens=2, stop_token_ids=[2], end_tokens=[0])
    tokens = [sample_rows(logits_V[None], [row])[0].token for _ in range(3)]
    assert tokens == [1, 1, 0]


def test_a_processor_sees_prompt_and_answer_and_its_logits_are_taken():
    seen = []

    def processor(prompt, answer, logits_V):
        seen.append((prompt, answer))
        return torch.where(torch.arange(4) == 3, 5.0, logits_V)

    row = state(4, temperature=0, logits_processor=processor, answer=[2])
    assert sample_rows(torch.zeros(1, 4), [row])[0].token == 3
    assert seen == [([1, 2, 3], [2])]


def test_a_processor_may_be_a_function_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def last(prompt, answer, logits_V):\n    logits_V[-1] = 99\n    return logits_V\n", encoding="utf-8"
    )
    row = state(4, temperature=0, logits_processor="mine.py:last", folder=tmp_path)
    assert sample_rows(torch.zeros(1, 4), [row])[0].token == 3
    with pytest.raises(ConfigError, match="there is no file"):
        state(4, logits_processor="other.py:last", folder=tmp_path)


def test_a_processor_that_fails_concerns_its_own_row():
    def failing(prompt, answer, logits_V):
        raise KeyError("x")

    def cutting(prompt, answer, logits_V):
        return logits_V[1:]

    rows = [
        state(4, temperature=0, logits_processor=failing),
        state(4, temperature=0),
        state(4, logits_processor=cutting),
    ]
    first, second, third = sample_rows(torch.arange(12.0).view(3, 4), rows)
    assert str(first) == "logits_processor failed: KeyError: 'x'" and isinstance(first, RequestError)
    assert second.token == 3
    assert "logits_processor gave a tensor of shape (3,)" in str(third)
    assert [row.answer for row in rows] == [[], [3], []]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_a_usable_logit_gets_an_error_and_the_others_go_on(temperature):
    logits_RV = torch.zeros(4, 5)
    logits_RV[1, 2], logits_RV[2] = math.nan, -torch.inf
    rows = [state(5, temperature=temperature) for _ in range(4)]
    first, damaged, empty, last = sample_rows(logits_RV, rows)
    assert "not finite" in str(damaged) and "no token may come next" in str(empty)
    assert rows[0].answer == [first.token] and rows[3].answer == [last.token] and rows[1].answer == rows[2].answer == []


@pytest.mark.parametrize(
    "settings_", [{"logit_bias": {9: 1}}, {"allowed_tokens": [9]}, {"banned_tokens": [9]}, {"stop_token_ids": [9]}]
)
def test_a_token_outside_the_vocabulary_is_named(settings_):
    with pytest.raises(RequestError, match=f"{next(iter(settings_))}: token id 9 is outside the vocabulary of 9 tokens"):
        state(9, **settings_)


def test_log_probs_are_those_of_the_model_before_any_change():
    logits_V = random_logits(1)[0]
    (sampled,) = sample_rows(
        logits_V[None], [state(temperature=0.1, top_k=2, banned_tokens=[int(logits_V.argmax())], logprobs=4)]
    )
    expected_V = logits_V.log_softmax(-1)
    values, ids = expected_V.topk(4)
    assert sampled.log_probs.token == expected_V[sampled.token].item()
    assert sampled.log_probs.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_log_probs_without_top_hold_the_token_alone():
    logits_RV = random_logits(2)
    first, second = sample_rows(logits_RV, [state(temperature=0, logprobs=0), state(temperature=0)])
    assert first.log_probs.top == () and first.log_probs.token == logits_RV[0].log_softmax(-1).max().item()
    assert second.log_probs is None


def test_answers_to_one_prompt_have_numbers_of_their_own():
    logits_V = torch.zeros(1, VOCAB)
    tokens = [sample_rows(logits_V, [state(seed=1, index=index)])[0].token for index in range(6)]
    again = [sample_rows(logits_V, [state(seed=1, index=index)])[0].token for index in range(6)]
    assert tokens == again and len(set(tokens)) > 3


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 10_000), st.booleans())
@settings(deadline=None)
def test_the_largest_are_those_of_topk(size, count, seed, coarse):
    values_BV = random_logits(3, size * 8, seed)
    values_BV = values_BV.round() if coarse else values_BV
    count = min(count, size)
    values_BK, places_BK = largest(values_BV, count)
    assert torch.equal(values_BK, values_BV.topk(count).values)
    assert torch.equal(values_BV.gather(-1, places_BK), values_BK)
    assert all(len(set(places)) == count for places in places_BK.tolist())


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.25, 3.0]), min_size=1, max_size=9),
    st.sampled_from([1, 255, 256, 257, 600]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_a_draw_is_the_first_place_whose_share_exceeds_the_number(some, size, number, seed):
    weights = np.random.default_rng(seed).choice(np.array(some, np.float32), size)
    (place,) = draw(torch.from_numpy(weights)[None], torch.tensor([number], dtype=torch.float64)).tolist()
    cumulative = weights.astype(np.float64).cumsum()
    if cumulative[-1] == 0:
        assert place == -1
        return
    assert weights[place] > 0
    slack = 1e-6 * cumulative[-1]  # blocks are summed in float32
    assert cumulative[place] >= number * cumulative[-1] - slack
    assert cumulative[place] - weights[place] <= number * cumulative[-1] + slack


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("size", [3, 256, 300, 900])
def test_a_place_of_weight_0_is_never_drawn(number, size):
    weights_BV = torch.zeros(1, size)
    weights_BV[0, size // 2] = 0.3
    assert draw(weights_BV, torch.tensor([number], dtype=torch.float64)).tolist() == [size // 2]


def test_a_grammar_that_nobody_compiled_is_never_ignored():
    with pytest.raises(RequestError, match="regex is not served here"):
        state(regex="a")
