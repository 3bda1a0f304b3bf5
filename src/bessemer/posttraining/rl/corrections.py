"""Corrections for answers that were sampled by other weights, or by another program, than the policy that is called old.

The importance weight of a token is w = π_old / π_sampler, held within e^±20, of a token, or of its sequence. Weights multiply
the loss of a token and get no gradient; a weight of zero leaves it out, and the denominators stay as they are.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.posttraining.rl.sequences import Level, Sequences


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
