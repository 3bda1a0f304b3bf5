"""Attention: every position attends to those before it (Vaswani et al. 2017), in groups of heads that share keys and values
(Ainslie et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.model.attention_backends import AttentionBackend, Scores, sdpa
from bessemer.model.attention_mask import AttentionMask
from bessemer.model.cache import Cache
from bessemer.model.config import ModelConfig
from bessemer.model.norms import make_norm
from bessemer.model.rope import Rotation, rotate

# Shapes: B batch, T time, S positions seen, D hidden, H query heads, K key-value heads, C channels of a head.


class Attention(nn.Module):
    """softmax(q kᵀ / √C) v, where H / K query heads share a key and a value head.

    K = H is multi-head attention, K = 1 multi-query attention. Queries and keys may be normed (Dehghani et al. 2023), over
    each head or over all, before they are turned.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.backend: AttentionBackend = sdpa
        self.interleave = config.rope_interleave
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.has_gate = config.attention_output_gate
        # the gate's rows lie beside the query's, head by head
        self.q_proj = nn.Linear(config.hidden_size, query_width * (2 if self.has_gate else 1), bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_output_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm == "head":
            self.q_norm = make_norm(config, config.head_dim)
            self.k_norm = make_norm(config, config.head_dim)
        elif config.qk_norm == "full":
            self.q_norm = make_norm(config, query_width)
            self.k_norm = make_norm(config, key_value_width)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None) -> Tensor:
        """Attend from every position to what it may see; returns (B, T, D).

        rotation: of the positions; None where the layer has none.
        """
        query, key, value = self.q_proj(hidden_BTD), self.k_proj(hidden_BTD), self.v_proj(hidden_BTD)
        split = (*hidden_BTD.shape[:2], -1, self.head_dim)
        gate = None
        if self.has_gate:
            query, gate = query.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
            query, gate = query.flatten(2), gate.flatten(2)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query_BTHC, key_BTKC = query.view(split), key.view(split)
        if self.qk_norm == "head":
            query_BTHC, key_BTKC = self.q_norm(query_BTHC), self.k_norm(key_BTKC)
        query_BHTC, key_BKTC, value_BKTC = (heads.transpose(1, 2) for heads in (query_BTHC, key_BTKC, value.view(split)))
        if rotation is not None:
            query_BHTC, key_BKTC = (rotate(heads, rotation, self.interleave) for heads in (query_BHTC, key_BKTC))
        scores = Scores(self.scale, self.softcap, self.sinks)
        if cache is None:
            attended_BHTC = self.backend(query_BHTC, key_BKTC, value_BKTC, mask, scores)
        else:
            attended_BHTC = cache.attend(self.layer, query_BHTC, key_BKTC, value_BKTC, mask, scores, self.backend)
        attended = attended_BHTC.transpose(1, 2).flatten(2)
        if gate is not None:
            attended = attended * torch.sigmoid(gate)
        return self.o_proj(attended)
