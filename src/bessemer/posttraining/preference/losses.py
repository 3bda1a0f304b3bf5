"""Losses of pairs of answers, as functions of how much likelier the policy makes each answer than the reference does.

For a pair with the chosen answer y_w and the rejected y_l to a prompt x, the *log-ratio* of an answer is
log π(y | x) − log π_ref(y | x), in nats: summed over the answer's tokens, or their mean, as each loss asks. A loss without a
reference is given log π alone.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

#: Largest log-probability x for which log(1 − exp(x)) is finite in float32.
_LARGEST_LOG_PROB = -1e-6


@dataclass(frozen=True)
class PairLossSettings:
    """beta: how strongly the policy is held to the reference, or the scale of the margin. label_smoothing: share of pairs whose
    labels are taken to be swapped, below one half; or how probably each is, (P,), at most one half. margin: γ of SimPO, the
    margin of mean log-probabilities times β; None: half of β (Meng et al. 2024 take γ/β between 0.1 and 0.8)."""

    beta: float = 0.1
    label_smoothing: float | Tensor = 0.0
    margin: float | None = None


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs.

    function: of the log-ratios of the chosen and of the rejected answers, (P,), the loss of each pair, (P,). per_token: the
    log-ratios are means over the answer's tokens, and not sums. needs_reference: they are against a reference. next_token:
    weight of the mean cross-entropy of the chosen conversation, prompt included, that belongs to the method. soft_labels: it
    takes a smoothing for each pair, and so pairs whose label is only probable.
    """

    function: Callable[[Tensor, Tensor, PairLossSettings], Tensor]
    per_token: bool = False
    needs_reference: bool = True
    next_token: float = 0.0
    soft_labels: bool = False


def sigmoid(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): −log σ(βΔ) with Δ the difference of the log-ratios.

    With smoothing ε, −(1 − ε) log σ(βΔ) − ε log σ(−βΔ) (Mitchell 2023, "conservative DPO").
    """
    scaled_P = settings.beta * (chosen_P - rejected_P)
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * logsigmoid(scaled_P) - smoothing * logsigmoid(-scaled_P)


def robust(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """Unbiased where a share ε of the labels is swapped (Chowdhury et al. 2024, eq. 12)."""
    scaled_P = settings.beta * (chosen_P - rejected_P)
    smoothing = settings.label_smoothing
    return (-(1 - smoothing) * logsigmoid(scaled_P) + smoothing * logsigmoid(-scaled_P)) / (1 - 2 * smoothing)


def hinge(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """max(0, 1 − βΔ) (SLiC; Zhao et al. 2023, in the form of Liu et al. 2024, RSO)."""
    return relu(1 - settings.beta * (chosen_P - rejected_P))


def ipo(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """(Δ − 1/(2β))² with mean log-ratios (Azar et al. 2023, eq. 17)."""
    return (chosen_P - rejected_P - 1 / (2 * settings.beta)).square()


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """1 − σ(βw) + σ(βl): the chosen answer is made likelier and the rejected less likely (D'Oosterlinck et al. 2024)."""
    return 1 - torch.sigmoid(settings.beta * chosen_P) + torch.sigmoid(settings.beta * rejected_P)


def apo_down(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """σ(βw) + 1 − σ(βΔ): both less likely, the rejected more so, for data worse than the model (D'Oosterlinck et al. 2024)."""
    return torch.sigmoid(settings.beta * chosen_P) + 1 - torch.sigmoid(settings.beta * (chosen_P - rejected_P))


def sppo_hard(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """(w − 1/(2β))² + (l + 1/(2β))² (Wu et al. 2024, self-play preference optimisation, with hard labels)."""
    target = 0.5 / settings.beta
    return (chosen_P - target).square() + (rejected_P + target).square()


def simpo(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """−log σ(βΔ − γ) of mean log-probabilities (Meng et al. 2024, eq. 6). Smoothing as in `sigmoid`."""
    margin = settings.beta / 2 if settings.margin is None else settings.margin
    scaled_P = settings.beta * (chosen_P - rejected_P) - margin
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * logsigmoid(scaled_P) - smoothing * logsigmoid(-scaled_P)


def orpo(chosen_P: Tensor, rejected_P: Tensor, settings: PairLossSettings) -> Tensor:
    """−β log σ(log odds of the chosen − log odds of the rejected), of p = exp(mean log-probability) (Hong et al. 2024, eq. 6
    and 7). The method adds the cross-entropy of the chosen conversation."""
    log_odds_P = (chosen_P - rejected_P) - (_log1m_exp(chosen_P) - _log1m_exp(rejected_P))
    return -settings.beta * logsigmoid(log_odds_P)


def _log1m_exp(log_probs: Tensor) -> Tensor:
    """log(1 − exp x) for x < 0, without cancellation on either side of −log 2 (Mächler 2012)."""
    capped = log_probs.clamp(max=_LARGEST_LOG_PROB)
    near_zero = capped > -0.6931472
    # each branch is given only values that it is finite for: a gradient through the other would be NaN
    small = torch.log(-torch.expm1(torch.where(near_zero, capped, torch.full_like(capped, -0.5))))
    large = torch.log1p(-torch.exp(torch.where(near_zero, torch.full_like(capped, -1.0), capped)))
    return torch.where(near_zero, small, large)


SIGMOID = PairLoss(sigmoid, soft_labels=True)
SIGMOID_NORM = PairLoss(sigmoid, per_token=True, soft_labels=True)
HINGE = PairLoss(hinge)
IPO = PairLoss(ipo, per_token=True)
ROBUST = PairLoss(robust)
APO_ZERO = PairLoss(apo_zero)
APO_DOWN = PairLoss(apo_down)
SPPO_HARD = PairLoss(sppo_hard)
SIMPO = PairLoss(simpo, per_token=True, needs_reference=False, soft_labels=True)
ORPO = PairLoss(orpo, per_token=True, needs_reference=False, next_token=1.0)


def kto(log_ratios_S: Tensor, desirable_S: Tensor, kl: Tensor, beta: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8) of S answers: 1 − σ(β(r − z)) of a desirable one, 1 − σ(β(z − r)) of another.

    log_ratios_S: summed over the answer's tokens. desirable_S: boolean. kl: the mean log-ratio of answers to other prompts, a
    scalar taken over the whole batch; z is its positive part, through which no gradient flows.
    """
    z = kl.detach().clamp(min=0)
    better_S = torch.where(desirable_S, log_ratios_S - z, z - log_ratios_S)
    return 1 - torch.sigmoid(beta * better_S)


def npo(log_ratios_S: Tensor, beta: float) -> Tensor:
    """NPO (Zhang et al. 2024, arXiv 2404.05868, eq. 3) of S answers to forget: (2/β) log(1 + (π / π_ref)^β).

    log_ratios_S: log π − log π_ref, summed over the answer's tokens. The gradient is that of gradient ascent times
    2 (π / π_ref)^β / (1 + (π / π_ref)^β), which falls to 0 as the answer becomes unlikely; ascent itself, the limit of β → 0,
    has no lower end.
    """
    return -2 / beta * logsigmoid(-beta * log_ratios_S)
