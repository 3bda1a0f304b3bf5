"""Root-mean-square norm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of 1, then each channel by its weight.

    Computed in the weight's type or better: under autocast a bfloat16 input is normed in float32.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns the same shape, in the weight's type."""
        return functional.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
