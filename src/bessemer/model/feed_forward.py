"""SwiGLU feed-forward (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), at every position alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        return self.down_proj(functional.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))
