"""Losses of a policy's tokens: what makes likelier the tokens of answers that were better than expected.

ρ is the ratio of the policy to the one that is taken as old, exp(log π − log π_old), of a token or of its sequence. A is the
token's advantage. Each function gives the loss of each token, before it is aggregated.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.posttraining.rl.sequences import Level, Sequences


@dataclass(frozen=True)
class PolicyLossSettings:
    """clip_low, clip_high: ρ is held within 1 − clip_low and 1 + clip_high. dual_clip: largest factor of A where A < 0 (Ye et
    al. 2020); None: none. largest_ratio: ρ is held below it before anything else; None: not. temperature, temperature_negative:
    τ of `sapo`, where A is positive and where it is negative."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    largest_ratio: float | None = None
    temperature: float = 1.0
    temperature_negative: float = 1.05


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of tokens. function: (log π, ρ, A, settings), each (B, T), to (B, T). level: what ρ stands for, unless the run's
    settings say else. clips: whether a token beyond the bounds loses its gradient."""

    function: Callable[[Tensor, Tensor, Tensor, PolicyLossSettings], Tensor]
    level: Level = "token"
    clips: bool = False


def clipped(log_probs_BT: Tensor, ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """−min(ρA, clip(ρ)A) (PPO; Schulman et al. 2017, eq. 7). With two bounds "clip higher" (DAPO; Yu et al. 2025, eq. 8)."""
    held_BT = ratios_BT if settings.largest_ratio is None else ratios_BT.clamp(max=settings.largest_ratio)
    inside_BT = ratios_BT.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    loss_BT = -torch.minimum(held_BT * advantages_BT, inside_BT * advantages_BT)
    if settings.dual_clip is None:
        return loss_BT
    return torch.where(advantages_BT < 0, torch.minimum(loss_BT, -settings.dual_clip * advantages_BT), loss_BT)


def cispo(log_probs_BT: Tensor, ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """−sg(clip(ρ)) A log π: a token beyond the bounds keeps its gradient, at the bound's weight (MiniMax-M1, 2025, eq. 4)."""
    inside_BT = ratios_BT.clamp(1 - settings.clip_low, 1 + settings.clip_high).detach()
    return -inside_BT * advantages_BT * log_probs_BT


def sapo(log_probs_BT: Tensor, ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """−A (4/τ) σ(τ(ρ − 1)): a smooth gate in the place of a clip (arXiv 2511.20347)."""
    positive = torch.full_like(ratios_BT, settings.temperature)
    temperature_BT = torch.where(advantages_BT > 0, positive, torch.full_like(ratios_BT, settings.temperature_negative))
    return -advantages_BT * (4 / temperature_BT) * torch.sigmoid(temperature_BT * (ratios_BT - 1))


def importance(log_probs_BT: Tensor, ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """−ρA, without a clip."""
    return -ratios_BT * advantages_BT


def reinforce(log_probs_BT: Tensor, ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """−A log π (Williams 1992): of samples of the policy itself."""
    return -advantages_BT * log_probs_BT


CLIP = PolicyLoss(clipped, clips=True)
GSPO = PolicyLoss(clipped, "sequence_mean", clips=True)
CISPO = PolicyLoss(cispo)
SAPO = PolicyLoss(sapo)
IMPORTANCE = PolicyLoss(importance)
REINFORCE = PolicyLoss(reinforce)


def policy_loss(
    loss: PolicyLoss,
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor,
    advantages_BT: Tensor,
    sequences: Sequences,
    settings: PolicyLossSettings,
    level: Level | None = None,
) -> tuple[Tensor, Tensor]:
    """(the loss of each token, ρ), both (B, T); the loss is differentiable by `log_probs_BT`, ρ is not."""
    log_ratios_BT = sequences.log_ratios(level or loss.level, log_probs_BT - old_log_probs_BT)
    ratios_BT = log_ratios_BT.exp()
    return loss.function(log_probs_BT, ratios_BT, advantages_BT, settings), ratios_BT.detach()


def clipped_tokens(ratios_BT: Tensor, advantages_BT: Tensor, settings: PolicyLossSettings) -> Tensor:
    """Whether a clip takes a token's gradient: ρ above its bound where A > 0, below it where A < 0."""
    above_BT = (ratios_BT > 1 + settings.clip_high) & (advantages_BT > 0)
    return above_BT | ((ratios_BT < 1 - settings.clip_low) & (advantages_BT < 0))


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float | None) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± c) − R)²) of each token (PPO's implementations; Huang et al. 2022, detail 9)."""
    squares_BT = (values_BT - returns_BT).square()
    if clip is not None:
        held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        squares_BT = torch.maximum(squares_BT, (held_BT - returns_BT).square())
    return 0.5 * squares_BT
