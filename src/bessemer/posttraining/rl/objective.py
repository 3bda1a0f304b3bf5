"""The objective of reinforcement learning: policy loss, correction, aggregation and divergence, put together from registries.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.model.decoder import Decoder
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.losses import (
    Aggregation,
    Correction,
    CorrectionSettings,
    Level,
    PolicyLoss,
    PolicyLossSettings,
    Sequences,
    clipped_tokens,
    importance_weights,
    k1,
    policy_loss,
)
from bessemer.posttraining.rl.methods import AGGREGATIONS, CORRECTIONS, DIVERGENCES, POLICY_LOSSES
from bessemer.posttraining.sampling.samples import ADVANTAGES, SAMPLER
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import target_log_probs
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms

#: Values of tokens in a batch: log-probabilities of the policy before the first update on the rollout, and of the reference.
OLD, TOKEN_REFERENCE_LOG_PROBS = "old_log_probs", "reference_log_probs"


@dataclass(frozen=True)
class PolicySettings:
    """Settings of the objective that are numbers or switches.

    temperature: that of the samples. answers: completions of a whole step, and longest: most tokens of one; the aggregation
    `constant` divides by their product. beta: weight of the divergence in the loss. weighted_divergence: whether the divergence
    is also multiplied by the ratio of policies. bitwise_consistent: whether log-probabilities must equal the sampler's to the
    bit.
    """

    temperature: float
    answers: int
    longest: int
    beta: float = 0.0
    weighted_divergence: bool = False
    entropy_weight: float = 0.0
    bitwise_consistent: bool = False
    level: Level | None = None
    policy: PolicyLossSettings = field(default_factory=PolicyLossSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)


class PolicyObjective(Objective):
    """The loss of the policy's tokens, and perhaps the divergence from a reference and the entropy beside it.

    A batch has targets where the policy chose the token; `advantages` and `sampler_log_probs` by token; `old_log_probs` where
    more than one update is made of a rollout, otherwise the policy itself is the old one; `reference_log_probs` with beta.

    Logged, by token: `entropy`; `kl`, the divergence from the reference; `clip_share`, where the loss clips; `log_ratio`, the
    distance of the policy's log-probabilities, as old, from the sampler's, with its maximum, before any truncation;
    `log_ratio_over_cap`, the share of tokens whose importance weight, at the correction's level, lies outside the bounds.
    """

    guards_loss = False

    def __init__(
        self,
        loss: PolicyLoss,
        aggregation: Aggregation,
        correction: Correction,
        settings: PolicySettings,
        divergence: str = "k3",
    ) -> None:
        self._loss = loss
        self._aggregation = aggregation
        self._correction = correction
        self._settings = settings
        self._divergence = DIVERGENCES.find(divergence).load()

    @classmethod
    def of(cls, config: RLConfig) -> PolicyObjective:
        """The objective of a stage's settings. Raises ConfigError for a name that is none."""
        correction: Correction = CORRECTIONS.find(config.correction).load()
        settings = PolicySettings(
            temperature=config.temperature,
            answers=config.batch_size,
            longest=config.max_tokens,
            beta=config.beta if config.kl == "loss" else 0.0,
            weighted_divergence=config.weighted_divergence,
            entropy_weight=config.entropy_weight,
            bitwise_consistent=config.bitwise_consistent,
            level=config.level,
            policy=PolicyLossSettings(config.clip_low, config.clip_high, config.dual_clip),
            correction=correction.settings(config.correction_low, config.correction_high),
        )
        loss, aggregation = POLICY_LOSSES.find(config.loss).load(), AGGREGATIONS.find(config.aggregation).load()
        return cls(loss, aggregation, correction, settings, config.divergence)

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The aggregation's denominator, for every term."""
        sequences = Sequences(batch, _mask(batch))
        count = self._aggregation.denominator(sequences, self._settings.longest, self._settings.answers)
        return dict.fromkeys(self._terms, count)

    @property
    def _terms(self) -> list[str]:
        divergence = ["kl"] if self._settings.beta else []
        return ["policy", *divergence, *(["entropy"] if self._settings.entropy_weight else [])]

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        settings = self._settings
        hidden_BTD = model.hidden(**batch.inputs)
        log_probs_BT, entropy_BT = target_log_probs(model, hidden_BTD, batch.targets_BT, temperature=settings.temperature)
        values = {name: value_BT.to(log_probs_BT.dtype) for name, value_BT in batch.per_token.items()}
        mask_BT = _mask(batch).to(log_probs_BT.dtype)
        sequences = Sequences(batch, mask_BT, context)
        old_BT = values.get(OLD, log_probs_BT.detach())
        advantages_BT = values[ADVANTAGES]
        losses_BT, ratios_BT = policy_loss(
            self._loss, log_probs_BT, old_BT, advantages_BT, sequences, settings.policy, settings.level
        )
        importance_BT = importance_weights(self._correction, old_BT, values[SAMPLER], sequences, settings.correction)
        weights_BT = self._aggregation.weights(sequences)
        sums = {"policy": (losses_BT * importance_BT * weights_BT).sum()}
        if settings.beta:
            # the divergence is taken under the policy itself, so no weight of the sampler applies
            divergence_BT = self._divergence(log_probs_BT - values[TOKEN_REFERENCE_LOG_PROBS])
            if settings.weighted_divergence:
                divergence_BT = divergence_BT * ratios_BT
            sums["kl"] = settings.beta * (divergence_BT * weights_BT).sum()
        if settings.entropy_weight:
            sums["entropy"] = -settings.entropy_weight * (entropy_BT * weights_BT).sum()
        with torch.no_grad():
            mismatch_BT = (old_BT - values[SAMPLER]) * mask_BT
            if settings.bitwise_consistent:
                check_bitwise(mismatch_BT)
            tokens = mask_BT.sum()
            importance_raw_BT = sequences.log_ratios(self._correction.level, mismatch_BT).exp()
            bounds = settings.correction
            beyond_BT = (importance_raw_BT > bounds.high) | (importance_raw_BT < bounds.low)
            figures_BT = {"entropy": entropy_BT, "log_ratio_over_cap": beyond_BT.to(mask_BT.dtype)}
            if self._loss.clips:
                figures_BT["clip_share"] = clipped_tokens(ratios_BT, advantages_BT, settings.policy).to(mask_BT.dtype)
            if TOKEN_REFERENCE_LOG_PROBS in values:
                figures_BT["kl"] = k1(log_probs_BT - values[TOKEN_REFERENCE_LOG_PROBS])
            metrics = {name: Metric((one_BT * mask_BT).sum(), tokens) for name, one_BT in figures_BT.items()}
            metrics["log_ratio"] = Metric(mismatch_BT.abs().sum(), tokens, mismatch_BT.abs().max())
        return Terms(sums, metrics)


class MismatchError(BessemerError):
    """The trainer's log-probabilities are not those that the sampler gave."""


def check_bitwise(mismatch_BT: Tensor) -> None:
    """Raise MismatchError unless each difference of log-probabilities, trainer less sampler, is zero."""
    differs_BT = mismatch_BT != 0
    if bool(differs_BT.any()):
        largest = float(mismatch_BT.abs().max())
        raise MismatchError(
            f"bitwise_consistent: {int(differs_BT.sum()):,} of {differs_BT.numel():,} log-probabilities are not the sampler's, "
            f"by up to {largest:.3g} nats; the checkpoints are kept; train without it, and tell us the model and the settings"
        )


def _mask(batch: Batch) -> Tensor:
    return (batch.targets_BT != IGNORE_INDEX).float()
