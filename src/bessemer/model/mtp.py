"""MTP modules, for multi-token prediction (DeepSeek-V3, section 2.2): they predict the tokens after the next, in a chain.

Module k takes at position i the state of the module before it (at first the model's pre-norm hidden state) and the embedding
of token i + k, and predicts token i + k + 1. In training it makes the model plan ahead; in generation it drafts tokens.
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
        self.embedding_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = make_norm(config)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What the block reads, (B, T, D)."""
        return self.proj(torch.cat((self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1))
