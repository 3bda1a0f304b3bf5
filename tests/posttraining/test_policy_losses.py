"""Advantages, losses, aggregations, divergences and corrections beside plain loops over answers and tokens."""

import math
from statistics import fmean, stdev

import pytest
import torch

from bessemer.posttraining.rl import advantages
from bessemer.posttraining.rl.advantages import decoupled, generalised_advantages, is_informative
from bessemer.posttraining.rl.losses import (
    CorrectionSettings,
    PolicyLossSettings,
    Sequences,
    clipped_tokens,
    importance_weights,
    policy_loss,
    value_loss,
)
from bessemer.posttraining.rl.methods import ADVANTAGES, AGGREGATIONS, CORRECTIONS, DIVERGENCES, POLICY_LOSSES
from bessemer.training.data.batch import Batch

GROUP = 4
REWARDS = [1.0, 0.0, 0.5, 0.25, 2.0, 2.0, 2.0, 2.0, -1.0, 3.0, math.nan, 0.0]


def groups(values):
    return [values[start : start + GROUP] for start in range(0, len(values), GROUP)]


def known(values):
    return [value for value in values if not math.isnan(value)]


def z(values, epsilon, deviation=None):
    mean = fmean(known(values))
    spread = stdev(known(values)) if deviation is None else deviation
    return [0.0 if math.isnan(value) else (value - mean) / (spread + epsilon) for value in values]


def whitened(values):
    mean, spread = fmean(known(values)), stdev(known(values))
    return [0.0 if math.isnan(value) else (value - mean) / math.sqrt(spread**2 + 1e-8) for value in values]


def centred(values):
    return [value - fmean(known(values)) for value in values]


def leave_one_out(values):
    others = [known(values[:i] + values[i + 1 :]) for i in range(len(values))]
    return [0.0 if math.isnan(value) else value - fmean(rest) for value, rest in zip(values, others, strict=True)]


def flat(parts):
    return [value for part in parts for value in part]


CENTRED = flat(centred(part) for part in groups(REWARDS))
# the mean of the centred rewards is that of their groups
CENTRED_SPREAD = math.sqrt(sum(value**2 for value in known(CENTRED)) / (len(known(CENTRED)) - 1))
EXPECTED = {
    "grpo": flat(z(part, 1e-4) for part in groups(REWARDS)),
    "group_mean": [0.0 if math.isnan(value) else value for value in CENTRED],
    "batch_deviation": flat(z(part, 1e-4, stdev(known(REWARDS))) for part in groups(REWARDS)),
    "centred_deviation": flat(z(part, 1e-4, CENTRED_SPREAD) for part in groups(REWARDS)),
    "rloo": flat(leave_one_out(part) for part in groups(REWARDS)),
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_an_advantage_is_its_formula_and_leaves_missing_rewards_out(name):
    found = ADVANTAGES[name].load()(torch.tensor(REWARDS, dtype=torch.float64), GROUP)
    assert found.tolist() == pytest.approx(EXPECTED[name], abs=1e-9)


def test_every_advantage_is_of_answers_or_the_rewards_to_go_of_reinforce_plus_plus():
    of_tokens = {name for name in ADVANTAGES if isinstance(ADVANTAGES[name].load(), advantages.RewardToGo)}
    assert of_tokens == {"reinforce_pp", "reinforce_pp_baseline"} == set(ADVANTAGES) - set(EXPECTED)
    rewards_R = torch.tensor(REWARDS, dtype=torch.float64)
    given = {name: ADVANTAGES[name].load().outcomes(rewards_R, GROUP).tolist() for name in of_tokens}
    assert given["reinforce_pp"] == pytest.approx(REWARDS, nan_ok=True)
    assert given["reinforce_pp_baseline"] == pytest.approx(CENTRED, nan_ok=True)


def test_a_group_without_any_reward_or_with_equal_ones_teaches_nothing():
    rewards_R = torch.tensor([math.nan] * GROUP + [0.5] * GROUP + [0.0, 1.0, math.nan, 1.0])
    assert is_informative(rewards_R, GROUP).tolist() == [False, False, True]
    for name in ("grpo", "group_mean", "rloo", "batch_deviation"):
        advantages = ADVANTAGES[name].load()(rewards_R, GROUP)
        assert advantages.isfinite().all() and not advantages[: 2 * GROUP].any()


def test_decoupled_rewards_are_scored_one_by_one():
    rewards_RK = torch.tensor([[0.0, 10.0], [1.0, 10.0], [0.0, 30.0], [1.0, 50.0]], dtype=torch.float64)
    by_reward = [z(column, 1e-4) for column in rewards_RK.T.tolist()]
    expected = whitened([2 * first + second for first, second in zip(*by_reward, strict=True)])
    found = decoupled(rewards_RK, torch.tensor([2.0, 1.0], dtype=torch.float64), GROUP)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_generalised_advantages_pass_over_the_tokens_of_others():
    random = torch.Generator().manual_seed(3)
    rewards_BT, values_BT = (torch.randn(2, 6, generator=random, dtype=torch.float64) for _ in range(2))
    mask_BT = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    found = generalised_advantages(rewards_BT, values_BT, mask_BT, discount=0.9, decay=0.8)
    for row in range(2):
        places = mask_BT[row].nonzero().flatten().tolist()
        values = [values_BT[row, t].item() for t in places] + [0.0]
        rewards = [rewards_BT[row, t].item() for t in places]
        errors = [rewards[i] + 0.9 * values[i + 1] - values[i] for i in range(len(places))]
        expected = [sum((0.9 * 0.8) ** (j - i) * errors[j] for j in range(i, len(places))) for i in range(len(places))]
        assert found.advantages_BT[row, places].tolist() == pytest.approx(expected)
        assert found.returns_BT[row, places].tolist() == pytest.approx(
            [advantage + value for advantage, value in zip(expected, values, strict=False)]
        )
    assert not found.advantages_BT[~mask_BT].any() and not found.returns_BT[~mask_BT].any()
    # two sequences in one row are what they are in rows of their own
    packed = [torch.cat([values_BT[0], values_BT[1]])[None] for values_BT in (rewards_BT, values_BT, mask_BT)]
    documents_BT = torch.tensor([[1] * 6 + [2] * 6])
    joined = generalised_advantages(*packed, document_ids_BT=documents_BT, discount=0.9, decay=0.8)
    assert torch.equal(joined.advantages_BT.view(2, 6), found.advantages_BT)
    assert torch.equal(joined.returns_BT.view(2, 6), found.returns_BT)
    chosen_N = found.advantages_BT[mask_BT]
    assert advantages.whitened(chosen_N).tolist() == pytest.approx(whitened(chosen_N.tolist()))


def packed() -> tuple[Batch, torch.Tensor]:
    """Two rows: one of two answers and padding, one of a single answer; and a mask with prompts and a tool's tokens out."""
    documents_BT = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    mask_BT = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1]], dtype=torch.float64)
    tokens_BT = torch.zeros(2, 8, dtype=torch.int64)
    values = {"group_tokens": torch.tensor([[5, 5], [4, 0]]), "group_answers": torch.tensor([[2, 2], [1, 0]])}
    return Batch(tokens_BT, tokens_BT, document_ids_BT=documents_BT, sequences=2, together=1, per_sequence=values), mask_BT


#: (row, columns) of the tokens that the policy chose, by answer.
ANSWERS = ((0, (1, 2)), (0, (4, 5, 6)), (1, (2, 3, 6, 7)))
SETTINGS = PolicyLossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0, largest_ratio=4.0)


def clip(ratio, advantage, log_prob):
    loss = -min(min(ratio, 4.0) * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    return min(loss, -3 * advantage) if advantage < 0 else loss


def sapo(ratio, advantage, log_prob):
    temperature = 1.0 if advantage > 0 else 1.05
    return -advantage * 4 / temperature / (1 + math.exp(-temperature * (ratio - 1)))


TOKEN_FORMULAS = {
    "clip": clip,
    "gspo": clip,
    "cispo": lambda ratio, advantage, log_prob: -min(max(ratio, 0.8), 1.28) * advantage * log_prob,
    "sapo": sapo,
    "importance": lambda ratio, advantage, log_prob: -ratio * advantage,
    "reinforce": lambda ratio, advantage, log_prob: -advantage * log_prob,
}


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_a_policy_loss_is_its_formula_token_by_token(name, level):
    batch, mask_BT = packed()
    random = torch.Generator().manual_seed(5)
    log_probs_BT, old_BT, advantages_BT = (torch.randn(2, 8, generator=random, dtype=torch.float64) for _ in range(3))
    log_probs_BT.requires_grad_()
    loss = POLICY_LOSSES[name].load()
    loss_BT, ratios_BT = policy_loss(loss, log_probs_BT, old_BT, advantages_BT, Sequences(batch, mask_BT), SETTINGS, level)
    for row, columns in ANSWERS:
        differences = [(log_probs_BT[row, t] - old_BT[row, t]).item() for t in columns]
        whole = sum(differences) / (len(columns) if level == "sequence_mean" else 1)
        for t, difference in zip(columns, differences, strict=True):
            ratio = math.exp(difference if level == "token" else whole)
            expected = TOKEN_FORMULAS[name](ratio, advantages_BT[row, t].item(), log_probs_BT[row, t].item())
            assert ratios_BT[row, t].item() == pytest.approx(ratio)
            assert loss_BT[row, t].item() == pytest.approx(expected, abs=1e-9)
    assert loss_BT.requires_grad


def test_a_clip_takes_the_gradient_and_cispo_keeps_it():
    batch, mask_BT = packed()
    old_BT, advantages_BT = torch.zeros(2, 8, dtype=torch.float64), torch.ones(2, 8, dtype=torch.float64)
    for name, gradient in (("clip", 0.0), ("cispo", -1.2)):
        log_probs_BT = torch.full((2, 8), math.log(2), dtype=torch.float64, requires_grad=True)
        loss_BT, ratios_BT = policy_loss(
            POLICY_LOSSES[name].load(), log_probs_BT, old_BT, advantages_BT, Sequences(batch, mask_BT), PolicyLossSettings()
        )
        (loss_BT * mask_BT).sum().backward()
        assert log_probs_BT.grad[mask_BT > 0].tolist() == pytest.approx([gradient] * 9)
        assert clipped_tokens(ratios_BT, advantages_BT, PolicyLossSettings()).all()


def test_what_is_clipped_is_told_by_each_bound_on_its_own_side():
    ratios_BT = torch.tensor([[1.25, 1.35, 0.75, 0.65, 1.35, 0.65]])
    advantages_BT = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0]])
    wide_above = PolicyLossSettings(clip_low=0.2, clip_high=0.3)
    assert clipped_tokens(ratios_BT, advantages_BT, wide_above).tolist() == [[False, True, True, True, False, False]]
    wide_below = PolicyLossSettings(clip_low=0.3, clip_high=0.2)
    assert clipped_tokens(ratios_BT, advantages_BT, wide_below).tolist() == [[True, True, False, True, False, False]]
    on_bounds = clipped_tokens(
        torch.tensor([0.5, 1.5]), torch.tensor([-1.0, 1.0]), PolicyLossSettings(clip_low=0.5, clip_high=0.5)
    )
    assert not on_bounds.any()


def test_corrections_have_the_bounds_of_their_sources():
    bounds = {name: CORRECTIONS[name].load().settings(None, None) for name in CORRECTIONS}
    assert (bounds["reject"].low, bounds["reject"].high) == (0.999, 1.001)  # verl: a geometric mean
    assert (bounds["icepop"].low, bounds["icepop"].high) == (0.5, 5.0)
    assert bounds["mask_sequence"].high == 3.0 and bounds["truncate"].high == 2.0
    assert CORRECTIONS["reject"].load().settings(0.9, None) == CorrectionSettings(0.9, 1.001)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("truncate", [0.25, 0.5, 1.0, 2.0, 2.0]),
        ("mask_sequence", [0.25, 0.5, 1.0, 2.0, 0.0]),
        ("icepop", [0.0, 0.5, 1.0, 2.0, 0.0]),
        ("reject", [0.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_a_weight_on_a_bound_is_within_it(name, kept):
    weights_BT = torch.tensor([[0.25, 0.5, 1.0, 2.0, 4.0]])
    assert CORRECTIONS[name].load().function(weights_BT, CorrectionSettings(0.5, 2.0)).tolist() == [kept]


@pytest.mark.parametrize("name", list(AGGREGATIONS))
def test_an_aggregation_is_its_mean_over_packed_answers_however_they_are_cut(name):
    batch, mask_BT = packed()
    losses_BT = torch.randn(2, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    answers = [[losses_BT[row, t].item() for t in columns] for row, columns in ANSWERS]
    expected = {
        "token_mean": fmean(flat(answers)),
        "sequence_mean": fmean(map(fmean, answers)),
        "constant": sum(flat(answers)) / (3 * 10),
        # the two answers of the first row are of one prompt
        "prompt_mean": fmean([fmean(answers[0] + answers[1]), fmean(answers[2])]),
    }[name]
    aggregation = AGGREGATIONS[name].load()
    denominator = aggregation.denominator(Sequences(batch, mask_BT), 10, 3)
    cut = [Sequences(batch.rows(slice(row, row + 1)), mask_BT[row : row + 1]) for row in range(2)]
    total = sum((aggregation.weights(part) * losses_BT[row : row + 1]).sum() for row, part in enumerate(cut))
    assert (total / denominator.value).item() == pytest.approx(expected)


def test_a_single_token_counts_whole_however_it_is_aggregated():
    tokens_BT = torch.zeros(2, 3, dtype=torch.int64)
    mask_BT = torch.tensor([[0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    values = {name: torch.tensor([[1], [0]]) for name in ("group_tokens", "group_answers")}
    sequences = Sequences(Batch(tokens_BT, tokens_BT, per_sequence=values), mask_BT)
    for name in AGGREGATIONS:
        aggregation = AGGREGATIONS[name].load()
        assert torch.equal(aggregation.weights(sequences), mask_BT)
        assert aggregation.denominator(sequences, 2, 3).value == (6 if name == "constant" else 1)
    assert sequences.lengths.tolist() == [[1], [1]]


def test_divergences_estimate_the_divergence_of_two_distributions():
    random = torch.Generator().manual_seed(1)
    policy_V, reference_V = (torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy_V.exp() * (policy_V - reference_V)).sum()
    means = {name: (policy_V.exp() * DIVERGENCES[name].load()(policy_V - reference_V)).sum() for name in DIVERGENCES}
    assert means["k1"].item() == pytest.approx(exact.item()) and means["k3"].item() == pytest.approx(exact.item())
    assert (DIVERGENCES["k3"].load()(policy_V - reference_V) >= 0).all()
    # k2's gradient is the divergence's: E[d · ∇log π]
    logits_V = policy_V.clone().requires_grad_()
    ratio_V = logits_V.log_softmax(0) - reference_V
    (of_k2,) = torch.autograd.grad((policy_V.exp() * DIVERGENCES["k2"].load()(ratio_V)).sum(), logits_V, retain_graph=True)
    (of_exact,) = torch.autograd.grad((logits_V.softmax(0) * (logits_V.log_softmax(0) - reference_V)).sum(), logits_V)
    assert of_k2.tolist() == pytest.approx(of_exact.tolist())


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_a_correction_weighs_by_token_or_by_answer(name):
    batch, mask_BT = packed()
    random = torch.Generator().manual_seed(4)
    old_BT, sampler_BT = (torch.randn(2, 8, generator=random, dtype=torch.float64) for _ in range(2))
    found_BT = importance_weights(
        CORRECTIONS[name].load(), old_BT, sampler_BT, Sequences(batch, mask_BT), CorrectionSettings(0.5, 2.0)
    )
    for row, columns in ANSWERS:
        differences = [(old_BT[row, t] - sampler_BT[row, t]).item() for t in columns]
        for t, difference in zip(columns, differences, strict=True):
            token, whole, mean = math.exp(difference), math.exp(sum(differences)), math.exp(fmean(differences))
            expected = {
                "none": 1.0,
                "truncate": min(token, 2.0),
                "mask_sequence": whole if whole <= 2 else 0.0,
                "icepop": token if 0.5 <= token <= 2 else 0.0,
                "reject": float(0.5 <= mean <= 2),
            }[name]
            assert found_BT[row, t].item() == pytest.approx(expected)


def test_a_value_is_held_near_the_one_that_the_advantages_came_from():
    values, old, returns = torch.tensor([1.0, 0.4]), torch.tensor([0.0, 0.5]), torch.tensor([2.0, 0.0])
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([0.5, 0.08])
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 1.8**2, 0.08])
