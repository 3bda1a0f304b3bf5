"""Inverse-CDF sampling: one uniform number, one token."""

from __future__ import annotations

import torch
from torch import Tensor

# Shapes: B batch, N candidates, U partial sums of candidates.

#: Candidates that are summed at once: only the sum that the number falls in is looked into.
_SUMMED = 256


def draw(weights_BN: Tensor, uniforms_B: Tensor) -> Tensor:
    """For each row the first place whose cumulative share of the weights exceeds the row's number; int64 (B,).

    weights_BN: float32, at least 0, not normalised. uniforms_B: float64 in [0, 1). Never a place of weight 0. A row whose
    weights are all 0 or not finite gets -1.
    """
    size = weights_BN.shape[-1]
    cumulative_BU = _cumulative_sums(weights_BN)
    total_B = cumulative_BU[:, -1]
    usable_B = total_B.isfinite() & (total_B > 0)
    target_B1 = (uniforms_B * total_B)[:, None]
    sum_B1 = _first_above(cumulative_BU, target_B1)
    below_B1 = torch.where(sum_B1 > 0, cumulative_BU.gather(-1, (sum_B1 - 1).clamp(min=0)), 0.0)

    places_BN = sum_B1 * _SUMMED + torch.arange(min(_SUMMED, size), device=weights_BN.device)
    inside_BN = weights_BN.gather(-1, places_BN.clamp(max=size - 1)) * (places_BN < size)
    place_B1 = sum_B1 * _SUMMED + _first_above(inside_BN.double().cumsum(-1), target_B1 - below_B1)
    return torch.where(usable_B, place_B1[:, 0], -1)


def total_weights(weights_BN: Tensor) -> Tensor:
    """The sum of each row's weights as `draw` has it, float64 (B,)."""
    return _cumulative_sums(weights_BN)[:, -1]


def _cumulative_sums(weights_BN: Tensor) -> Tensor:
    """The sums of `_SUMMED` weights each, the last one of fewer, added up; float64 (B, U)."""
    size = weights_BN.shape[-1]
    main = size // _SUMMED * _SUMMED
    sums = [weights_BN[:, :main].unflatten(-1, (-1, _SUMMED)).sum(-1)] if main else []
    if main < size:
        sums.append(weights_BN[:, main:].sum(-1, keepdim=True))
    return torch.cat(sums, -1).double().cumsum(-1)


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds the target; where rounding leaves none, the last that has a weight."""
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    found_B1 = torch.searchsorted(cumulative_BN, target_B1.contiguous(), right=True)
    return torch.minimum(found_B1, last_B1).clamp(max=cumulative_BN.shape[-1] - 1)


def uniform(generator: torch.Generator) -> float:
    """The next number of a request's own generator, in [0, 1)."""
    return torch.rand(1, dtype=torch.float64, generator=generator).item()


class RewindableUniforms:
    """The next numbers of a request's own generator, which can be rewound to behind the first few."""

    def __init__(self, generator: torch.Generator, count: int) -> None:
        self._generator = generator
        self._before = generator.get_state()
        self.numbers: list[float] = torch.rand(count, dtype=torch.float64, generator=generator).tolist()

    def use(self, count: int) -> None:
        """Rewind the generator to behind the first `count` numbers."""
        if count < len(self.numbers):
            self._generator.set_state(self._before)
            torch.rand(count, dtype=torch.float64, generator=self._generator)
