"""A block of the decoder, attention and a feed-forward, and the module that predicts a token further ahead (MTP).

MTP module k (DeepSeek-V3, section 2.2) takes at position i the state of the module before it (at first the model's pre-norm
hidden state) and the embedding of token i + k, and predicts token i + k + 1. In training it makes the model plan ahead; in
generation it drafts tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bessemer.model.attention.base import variant_of
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.cache import Cache
from bessemer.model.layers.feed_forward import FeedForward, SparseFeedForward
from bessemer.model.layers.norms import make_last_norm, make_norm
from bessemer.model.layers.positions import Rotation

# Shapes: B batch, T time, D hidden.


class Block(nn.Module):
    """One layer: attention between positions, then a feed-forward at each, both added to the residual stream.

    A norm stands before each of the two (Llama's `input_layernorm` and `post_attention_layernorm`), after each, or both.
    """

    def __init__(self, config: ModelConfig, layer: int, cached_as: int | None = None) -> None:
        """cached_as: the number by which caches know it, where that is not the layer's."""
        super().__init__()
        self.layer = layer
        cached_as = layer if cached_as is None else cached_as
        self.variant = variant_of(config, layer)
        before, after = config.norm_position != "after", config.norm_position != "before"
        self.input_layernorm = make_norm(config) if before else nn.Identity()
        self.add_module(self.variant.attribute, self.variant.load()(config, cached_as))
        self.attention_output_norm = make_norm(config) if after else nn.Identity()
        self.post_attention_layernorm = make_norm(config) if before else nn.Identity()
        self.mlp = SparseFeedForward(config) if config.is_sparse(layer) else FeedForward(config)
        self.feed_forward_output_norm = make_norm(config) if after else nn.Identity()
        self.residual_multiplier = config.residual_multiplier

    @property
    def attention(self) -> AttentionLayer:
        """The module of its attention, which is called `self_attn` or as the variant says."""
        return cast(AttentionLayer, self._modules[self.variant.attribute])

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None = None) -> Tensor:
        """Returns (B, T, D)."""
        attended_BTD = self.attention(self.input_layernorm(hidden_BTD), rotation, mask, cache)
        hidden_BTD = hidden_BTD + self._added(self.attention_output_norm(attended_BTD))
        return hidden_BTD + self._added(self.feed_forward_output_norm(self.mlp(self.post_attention_layernorm(hidden_BTD))))

    def _added(self, part_BTD: Tensor) -> Tensor:
        """What a part adds to the residual stream."""
        return part_BTD if self.residual_multiplier == 1 else part_BTD * self.residual_multiplier


class MtpModule(nn.Module):
    """Norms of both inputs, a projection of the two side by side, a block, and the norm before the shared head."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embedding_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = make_last_norm(config)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What the block reads, (B, T, D)."""
        return self.proj(torch.cat((self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1))
