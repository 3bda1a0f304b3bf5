"""Grouped-query attention (Ainslie et al. 2023) with query and key norm (Dehghani et al. 2023), as in Qwen3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.cache import KeyValueCache
from bessemer.model.config import ModelConfig
from bessemer.model.norms import RMSNorm
from bessemer.model.rope import Rotation, rotate

# Shapes: B batch, T time, S positions seen, D hidden, H query heads, K key-value heads, G query heads of a group, C channels.


class Attention(nn.Module):
    """softmax(q kᵀ / √C) v, where G = H / K query heads share a key and a value head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, rotation: Rotation, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Attend from every position to itself and those before it; returns (B, T, D).

        mask: added to the scores or true where a position may be seen, (B, 1, T, S). None means plain causal
        attention, or a single new token that sees all of the cache.
        """
        split = (*hidden_BTD.shape[:2], -1, self.head_dim)
        query_BHTC = rotate(self.q_norm(self.q_proj(hidden_BTD).view(split)).transpose(1, 2), rotation)
        key_BKTC = rotate(self.k_norm(self.k_proj(hidden_BTD).view(split)).transpose(1, 2), rotation)
        value_BKTC = self.v_proj(hidden_BTD).view(split).transpose(1, 2)
        if cache is not None:
            key_BKTC, value_BKTC = cache.append(self.layer, key_BKTC, value_BKTC)
        attended_BHTC = functional.scaled_dot_product_attention(
            query_BHTC,
            key_BKTC,
            value_BKTC,
            attn_mask=mask,
            is_causal=mask is None and query_BHTC.shape[2] > 1,
            enable_gqa=query_BHTC.shape[1] != key_BKTC.shape[1],
        )
        return self.o_proj(attended_BHTC.transpose(1, 2).flatten(2))


def document_mask(document_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores' mask for packed documents, (B, 1, T, T): 0 where a position may be seen, -inf elsewhere.

    A position sees those before it that carry the same document id. Built once per batch and shared by the
    layers, in the type of the scores, because a boolean one would be converted again by every layer.
    """
    length = document_ids_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=document_ids_BT.device).tril()
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    blocked_BTT = ~(same_BTT & causal_TT)
    return torch.zeros(blocked_BTT.shape, dtype=dtype, device=blocked_BTT.device).masked_fill_(blocked_BTT, -torch.inf)[:, None]
