"""Rotary positions (Su et al. 2021): a query and a key are turned by angles proportional to their positions, so that
their product depends on the distance between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

# Shapes: B batch, T time, P positions, C channels of a head.


class Rotation(NamedTuple):
    """Cosines and signed sines of a batch's positions; made once, used by every layer."""

    cosine: Tensor
    signed_sine: Tensor


class RotaryPositions(nn.Module):
    """A table of the rotations of positions 0 … P-1, in float32 whatever the model's type."""

    cosines: Tensor
    signed_sines: Tensor

    def __init__(self, head_dim: int, theta: float, positions: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.positions = head_dim, theta, positions
        self._build(torch.device("cpu"))

    def _build(self, device: torch.device) -> None:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        angles = torch.outer(torch.arange(self.positions, dtype=torch.float32, device="cpu"), frequencies)
        cosine_PC = torch.cat((angles.cos(), angles.cos()), dim=-1)
        # channel c is paired with c + C/2; the first of a pair gets minus its partner's sine
        signed_sine_PC = torch.cat((-angles.sin(), angles.sin()), dim=-1)
        self.register_buffer("cosines", cosine_PC.to(device), persistent=False)
        self.register_buffer("signed_sines", signed_sine_PC.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` would round the table for good: follow the device and stay in float32
        super()._apply(fn, recurse)
        if self.cosines.dtype != torch.float32:
            self._build(self.cosines.device)
        return self

    def forward(self, positions_BT: Tensor | None, length: int, dtype: torch.dtype) -> Rotation:
        """Rotations at the given positions, (B, 1, T, C), or at 0 … length-1, (T, C), when None.

        Raises ValueError when the sequence is longer than the table: the model was made for no more.
        """
        if length > self.positions:
            raise ValueError(f"{length:,} tokens exceed the model's max_position_embeddings of {self.positions:,}")
        if positions_BT is None:
            return Rotation(self.cosines[:length].to(dtype), self.signed_sines[:length].to(dtype))
        return Rotation(
            self.cosines[positions_BT].unsqueeze(1).to(dtype), self.signed_sines[positions_BT].unsqueeze(1).to(dtype)
        )


def rotate(heads_BHTC: Tensor, rotation: Rotation) -> Tensor:
    """Turns every pair of channels (c, c + C/2) by its position's angle. Same shape."""
    partner_BHTC = heads_BHTC.roll(heads_BHTC.shape[-1] // 2, dims=-1)
    return heads_BHTC * rotation.cosine + partner_BHTC * rotation.signed_sine
