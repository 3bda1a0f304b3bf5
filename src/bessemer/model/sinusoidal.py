"""Sinusoidal position encodings, added to the embedded tokens (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Shapes: B batch, T time.


class SinusoidalPositions(nn.Module):
    """Sines and cosines of falling frequencies; nothing is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions_BT: Tensor) -> Tensor:
        """(B, T, width) float32."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions_BT.device) / self.width
        angles = positions_BT[..., None].float() / 10_000**exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width]
