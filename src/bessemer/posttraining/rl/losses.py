"""Losses of a policy's tokens, their aggregation to one loss, corrections for samples of other weights, estimators of KL(π ‖
π_ref).

ρ = π / π_old is the ratio of a token, or of its sequence, and A the token's advantage. The loss of a step is Σ weight · loss
/ denominator over the tokens of all micro-batches and ranks: an aggregation is a weight of each token and a denominator of
the whole step. A correction multiplies the loss of a token by its importance weight w = π_old / π_sampler, held within
e^±20, which gets no gradient; a weight of zero leaves the token out, and the denominators stay as they are. The estimators
are of d = log π − log π_ref, from tokens that π sampled (Schulman 2020).

Shapes: B rows, T tokens of a row (in `Sequences`, of this rank), S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bessemer.training.data.batch import Batch
from bessemer.training.objectives import Count, LossContext

#: Level of an importance ratio: one token, a whole sequence, or the geometric mean over its tokens.
Level = Literal["token", "sequence_sum", "sequence_mean"]

#: Log-ratios are clamped to ± this before exp, so that no ratio is infinite (verl's bound).
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch. mask_BT: 1 for the tokens that the policy chose and that count, else 0."""

    batch: Batch
    mask_BT: Tensor
    context: LossContext = field(default_factory=LossContext)

    def sums(self, values_BT: Tensor) -> Tensor:
        """The sum of each sequence's masked tokens, (B, S); differentiable."""
        return self.context.sum_over_context(self.batch.sequence_sums(values_BT * self.mask_BT))

    @property
    def lengths(self) -> Tensor:
        """The number of masked tokens of each sequence, (B, S), at least 1."""
        return self.sums(self.mask_BT).clamp(min=1)

    def means(self, values_BT: Tensor) -> Tensor:
        """The mean of each sequence's masked tokens, (B, S); 0 of a sequence that has none. Differentiable."""
        return self.sums(values_BT) / self.lengths

    def of_tokens(self, values_BS: Tensor) -> Tensor:
        """The value of each token's sequence, (B, T)."""
        return self.batch.of_tokens(values_BS)

    def log_ratios(self, level: Level, log_ratios_BT: Tensor) -> Tensor:
        """The log-ratio that each token counts with, (B, T), held within ±20; differentiable."""
        if level == "sequence_sum":
            log_ratios_BT = self.of_tokens(self.sums(log_ratios_BT))
        elif level == "sequence_mean":
            log_ratios_BT = self.of_tokens(self.means(log_ratios_BT))
        return log_ratios_BT.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


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
    """(the loss of each token, ρ), both (B, T) and differentiable by `log_probs_BT`."""
    log_ratios_BT = sequences.log_ratios(level or loss.level, log_probs_BT - old_log_probs_BT)
    ratios_BT = log_ratios_BT.exp()
    return loss.function(log_probs_BT, ratios_BT, advantages_BT, settings), ratios_BT


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


@dataclass(frozen=True)
class Aggregation:
    """weights: of each token, (B, T), zero outside the mask. denominator: this rank's part, of whole rows.

    longest: the largest number of tokens of an answer, answers: of the whole step.
    """

    weights: Callable[[Sequences], Tensor]
    denominator: Callable[[Sequences, int, int], Count]


def _each_token(sequences: Sequences) -> Tensor:
    return sequences.mask_BT


def _over_length(sequences: Sequences) -> Tensor:
    return sequences.mask_BT / sequences.of_tokens(sequences.lengths)


def _over_group(sequences: Sequences) -> Tensor:
    """1 / tokens of all answers to the prompt: `group_tokens` of each sequence, which the source of the batch gives."""
    group_tokens_BS = sequences.batch.per_sequence["group_tokens"].to(sequences.mask_BT.dtype)
    return sequences.mask_BT / sequences.of_tokens(group_tokens_BS).clamp(min=1)


def _tokens(sequences: Sequences, longest: int, answers: int) -> Count:
    return Count(float(sequences.mask_BT.sum()), "token")


def _answers(sequences: Sequences, longest: int, answers: int) -> Count:
    """Answers that have a token: an answer that was dropped is in no mean."""
    return Count(float((sequences.sums(sequences.mask_BT) > 0).sum()), "sequence")


def _constant(sequences: Sequences, longest: int, answers: int) -> Count:
    return Count(float(longest * answers), "constant")


def _prompts(sequences: Sequences, longest: int, answers: int) -> Count:
    """Each answer is its share of its group's answers that have a token: the shares add up to the number of prompts."""
    has_tokens_BS = sequences.sums(sequences.mask_BT) > 0
    group_BS = sequences.batch.per_sequence["group_answers"].clamp(min=1)
    return Count(float(torch.where(has_tokens_BS, 1 / group_BS, 0.0).sum()), "sequence")


TOKEN_MEAN = Aggregation(_each_token, _tokens)
SEQUENCE_MEAN = Aggregation(_over_length, _answers)
CONSTANT = Aggregation(_each_token, _constant)
PROMPT_MEAN = Aggregation(_over_group, _prompts)


@dataclass(frozen=True)
class CorrectionSettings:
    """Bounds of a weight; below `low`, or above `high`, it is truncated or left out."""

    low: float = 0.5
    high: float = 2.0


@dataclass(frozen=True)
class Correction:
    """function: of importance weights, (B, T), the factors of the losses. level: what a weight stands for. bounds: where the
    settings name none; a mean over tokens moves far less than a token's weight, or their product."""

    function: Callable[[Tensor, CorrectionSettings], Tensor]
    level: Level = "token"
    bounds: CorrectionSettings = CorrectionSettings()

    def settings(self, low: float | None, high: float | None) -> CorrectionSettings:
        """Its bounds, where they are not given."""
        return CorrectionSettings(self.bounds.low if low is None else low, self.bounds.high if high is None else high)


def _nothing(weights_BT: Tensor, settings: CorrectionSettings) -> Tensor:
    return torch.ones_like(weights_BT)


def _truncated(weights_BT: Tensor, settings: CorrectionSettings) -> Tensor:
    return weights_BT.clamp(max=settings.high)


def _below(weights_BT: Tensor, settings: CorrectionSettings) -> Tensor:
    return weights_BT * (weights_BT <= settings.high)


def _between(weights_BT: Tensor, settings: CorrectionSettings) -> Tensor:
    return weights_BT * ((weights_BT >= settings.low) & (weights_BT <= settings.high))


def _kept(weights_BT: Tensor, settings: CorrectionSettings) -> Tensor:
    return ((weights_BT >= settings.low) & (weights_BT <= settings.high)).to(weights_BT.dtype)


NONE = Correction(_nothing)
TRUNCATE = Correction(_truncated)
#: TRL's bound.
MASK_SEQUENCE = Correction(_below, "sequence_sum", CorrectionSettings(high=3.0))
ICEPOP = Correction(_between, bounds=CorrectionSettings(0.5, 5.0))
#: verl's bounds of a geometric mean.
REJECT = Correction(_kept, "sequence_mean", CorrectionSettings(0.999, 1.001))


def importance_weights(
    correction: Correction,
    old_log_probs_BT: Tensor,
    sampler_log_probs_BT: Tensor,
    sequences: Sequences,
    settings: CorrectionSettings,
) -> Tensor:
    """The factor of each token's loss, (B, T), without gradient."""
    log_ratios_BT = (old_log_probs_BT - sampler_log_probs_BT).detach()
    return correction.function(sequences.log_ratios(correction.level, log_ratios_BT).exp(), settings)


#: Estimates the KL divergence of each token from log π − log π_ref, in the same shape.
Divergence = Callable[[Tensor], Tensor]

#: Log-ratios are clamped to ± this: `k3` grows with exp(−d).
_LARGEST = 20.0


def k1(log_ratio: Tensor) -> Tensor:
    """d: unbiased; its gradient as a loss is zero in expectation, so that it belongs into the reward."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """d²/2: biased in value; its gradient is that of the divergence."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """exp(−d) + d − 1: unbiased, never negative (used by GRPO; Shao et al. 2024, eq. 4)."""
    return torch.expm1(-log_ratio.clamp(-_LARGEST, _LARGEST)) + log_ratio


def absolute(log_ratio: Tensor) -> Tensor:
    """|d|."""
    return log_ratio.abs()
