"""Losses of pairs beside the papers' formulas, in plain Python, in value and gradient."""

import math

import pytest
import torch

from bessemer.posttraining.preference.config import PAIR_LOSSES, PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings, kto, orpo, simpo
from bessemer.posttraining.rl.config import RLConfig

SETTINGS = PairLossSettings(beta=0.3, label_smoothing=0.1, margin=0.7)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float) -> float:
    return -0.9 * math.log(sigma(x)) - 0.1 * math.log(sigma(-x))


def log_odds(mean_log_prob: float) -> float:
    p = math.exp(mean_log_prob)
    return math.log(p / (1 - p))


#: By loss: of the log-ratios of a chosen and a rejected answer, with β 0.3, ε 0.1, γ 0.7.
FORMULAS = {
    "sigmoid": lambda w, r: smoothed(0.3 * (w - r)),
    "sigmoid_norm": lambda w, r: smoothed(0.3 * (w - r)),
    "hinge": lambda w, r: max(0.0, 1 - 0.3 * (w - r)),
    "ipo": lambda w, r: (w - r - 1 / 0.6) ** 2,
    "robust": lambda w, r: (-0.9 * math.log(sigma(0.3 * (w - r))) + 0.1 * math.log(sigma(-0.3 * (w - r)))) / 0.8,
    "apo_zero": lambda w, r: 1 - sigma(0.3 * w) + sigma(0.3 * r),
    "apo_down": lambda w, r: sigma(0.3 * w) + 1 - sigma(0.3 * (w - r)),
    "sppo_hard": lambda w, r: (w - 0.5 / 0.3) ** 2 + (r + 0.5 / 0.3) ** 2,
    "simpo": lambda w, r: smoothed(0.3 * (w - r) - 0.7),
    "orpo": lambda w, r: -0.3 * math.log(sigma(log_odds(w) - log_odds(r))),
}


def test_what_a_loss_takes_is_that_of_its_paper():
    losses = {name: PAIR_LOSSES[name].load() for name in PAIR_LOSSES}
    assert {name for name, loss in losses.items() if loss.per_token} == {"sigmoid_norm", "ipo", "simpo", "orpo"}
    assert {name for name, loss in losses.items() if not loss.needs_reference} == {"simpo", "orpo"}
    assert {name for name, loss in losses.items() if loss.soft_labels} == {"sigmoid", "sigmoid_norm", "simpo"}
    assert {name: loss.next_token for name, loss in losses.items() if loss.next_token} == {"orpo": 1.0}


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_a_loss_of_pairs_is_its_formula_in_value_and_gradient(name):
    random = torch.Generator().manual_seed(7)
    # ORPO is given mean log-probabilities, which are negative; all others are defined there too
    pairs_P2 = -4 * torch.rand(20, 2, generator=random, dtype=torch.float64) - 1e-3
    chosen_P, rejected_P = (side.clone().requires_grad_() for side in pairs_P2.unbind(1))
    loss_P = PAIR_LOSSES[name].load().function(chosen_P, rejected_P, SETTINGS)
    loss_P.sum().backward()
    formula, step = FORMULAS[name], 1e-6
    for index, (w, r) in enumerate(pairs_P2.tolist()):
        assert loss_P[index].item() == pytest.approx(formula(w, r), abs=1e-9)
        of_chosen = (formula(w + step, r) - formula(w - step, r)) / (2 * step)
        of_rejected = (formula(w, r + step) - formula(w, r - step)) / (2 * step)
        assert chosen_P.grad[index].item() == pytest.approx(of_chosen, abs=1e-6)
        assert rejected_P.grad[index].item() == pytest.approx(of_rejected, abs=1e-6)


def test_orpo_is_finite_where_an_answer_is_certain_or_impossible():
    chosen_P = torch.tensor([0.0, -1e-9, -60.0], requires_grad=True)
    loss_P = orpo(chosen_P, torch.tensor([-60.0, -1e-9, 0.0]), SETTINGS)
    loss_P.sum().backward()
    assert loss_P.isfinite().all() and chosen_P.grad.isfinite().all()


def test_simpo_has_the_papers_beta_and_a_margin_of_half_of_it_where_nothing_is_said():
    """Meng et al. 2024, table 8: β from 2 to 10, and γ/β between 0.1 and 0.8; a β of sums would hardly tell answers apart."""
    of_simpo, of_dpo = ({"data": ["pairs.jsonl"], "loss": loss} for loss in ("simpo", "sigmoid"))
    config = PreferenceConfig.parse(of_simpo, "preference")
    assert (config.beta, config.margin, PreferenceConfig.parse(of_dpo, "preference").beta) == (2.0, None, 0.1)
    assert PreferenceConfig.parse(of_simpo | {"beta": 10, "margin": 3}, "preference").beta == 10
    online = {"data": ["prompts.jsonl"], "algorithm": "online_dpo"}
    assert [RLConfig.parse(online | more, "rl").beta for more in ({}, {"pair_loss": "simpo"})] == [0.1, 2.0]
    for beta, margin in ((2.0, 1.0), (10.0, 5.0)):
        loss_P = simpo(torch.tensor([-0.5]), torch.tensor([-1.25]), PairLossSettings(beta=beta))
        assert loss_P.tolist() == pytest.approx([-math.log(sigma(beta * 0.75 - margin))])


def test_kto_holds_the_reference_point_at_zero_or_above_and_fixed():
    ratios_S = torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    desirable_S = torch.tensor([True, True, False, False])
    for kl, z in ((0.4, 0.4), (-0.4, 0.0)):
        given = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        loss_S = kto(ratios_S, desirable_S, given, 0.3)
        expected = [
            1 - sigma(0.3 * (1.5 - z)),
            1 - sigma(0.3 * (-0.5 - z)),
            1 - sigma(0.3 * (z - 0.25)),
            1 - sigma(0.3 * (z - 2)),
        ]
        assert loss_S.tolist() == pytest.approx(expected, abs=1e-9)
        loss_S.sum().backward()
        assert given.grad is None
