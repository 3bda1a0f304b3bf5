"""Norms: root mean square (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.architecture import Architecture


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of 1, then each channel by its weight.

    Computed in the weight's type or better: under autocast a bfloat16 input is normed in float32.
    offset: the stored weight is the scale minus 1, as Gemma keeps it, so that weight decay pulls the scale to 1.
    """

    def __init__(self, width: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns the same shape, in the weight's type."""
        scale = self.weight + 1 if self.offset else self.weight
        return functional.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, scale, self.eps)


class LayerNorm(nn.Module):
    """Centres the last dimension and scales it to a variance of 1, then a weight and a bias per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns the same shape, in the weight's type."""
        return functional.layer_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config: Architecture, width: int | None = None) -> nn.Module:
    """The norm that a config asks for, over the residual stream or another width."""
    width = width or config.hidden_size
    if config.norm_type == "layer":
        return LayerNorm(width, config.rms_norm_eps)
    return RMSNorm(width, config.rms_norm_eps, config.norm_offset)
