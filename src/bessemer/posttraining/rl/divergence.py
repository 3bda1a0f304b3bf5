"""Estimators of the divergence KL(π ‖ π_ref) from tokens that π sampled, with d = log π − log π_ref (Schulman 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: From log π − log π_ref of tokens to an estimate of each, of the same shape.
Divergence = Callable[[Tensor], Tensor]

#: Log-ratios are held within ± this: `k3` grows with exp(−d).
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
