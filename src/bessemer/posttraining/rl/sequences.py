"""Sums and means over the tokens of sequences, however rows are packed and shared between ranks.

Shapes: B rows, T tokens of a row (here, of this rank), S sequences of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from bessemer.training.data.batches import Batch
from bessemer.training.objectives import LossContext

#: What a ratio of two policies stands for: one token, a sequence as a whole, or the geometric mean of its tokens.
Level = Literal["token", "sequence_sum", "sequence_mean"]

#: Log-ratios are held within ± this before exp, so that no ratio is infinite (verl's bound).
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
