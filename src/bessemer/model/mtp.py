"""Multi-token prediction (DeepSeek-V3, section 2.2): extra blocks that predict the tokens after the next, in a chain.

Block k takes at place i what the block before it made there and the embedding of token i + k, and predicts token
i + k + 1: so it trains the trunk to plan ahead, and it can draft tokens when the model generates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.norms import make_norm

# Shapes: B batch, T time, D hidden.


class MtpModule(nn.Module):
    """Norms of both inputs, a projection of the two side by side, a block, and the norm before the shared head."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = make_norm(config), make_norm(config)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = make_norm(config)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What the block reads, (B, T, D)."""
        return self.proj(torch.cat((self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1))
