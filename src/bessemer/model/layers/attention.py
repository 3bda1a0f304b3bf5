"""Attention modules: grouped-query attention and multi-head latent attention.

Grouped-query attention (Ainslie et al. 2023) is causal attention (Vaswani et al. 2017) whose groups of query heads share keys
and values. Latent attention (DeepSeek-V2, section 2.1) makes keys and values from one narrow vector per token and caches only
that vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_backends import AttentionBackend, AttentionMask, Scores, sdpa
from bessemer.model.layers.cache import AttentionInputs, Cache
from bessemer.model.layers.norms import RMSNorm, make_norm
from bessemer.model.layers.positions import Rotation, rotate, yarn_mscale

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
            inputs = AttentionInputs(query_BHTC, key_BKTC, value_BKTC, mask, scores, self.backend)
            attended_BHTC = cache.attend(self.layer, inputs)
        attended = attended_BHTC.transpose(1, 2).flatten(2)
        if gate is not None:
            attended = attended * torch.sigmoid(gate)
        return self.o_proj(attended)


# Shapes: B batch, T time, S positions seen, D hidden, L latent, H heads, N channels without position, R with, V of a value.
# DeepSeek-V3 fixes it, whatever the other norms use
_LATENT_NORM_EPS = 1e-6


class HeadProduct(nn.Module):
    """vectors · matrix, head by head: a module so that adapters of `kv_b_proj` can add to it."""

    def forward(self, vectors_BHTI: Tensor, matrix_HIO: Tensor) -> Tensor:
        """(B, H, T, I) to (B, H, T, O), in the type of the vectors."""
        return vectors_BHTI @ matrix_HIO.to(vectors_BHTI.dtype)


class LatentAttention(nn.Module):
    """Every head has N channels without position, made from the latent, and R rotary ones; the key's rotary channels are
    one vector that all heads share.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.layer = layer
        self.interleave = config.rope_interleave
        self.backend: AttentionBackend = sdpa
        self.heads = config.num_attention_heads
        self.latent = config.kv_lora_rank
        self.unturned = config.qk_nope_head_dim
        self.turned = config.qk_rope_head_dim
        self.value = config.v_head_dim
        query_width, bias = self.heads * (self.unturned + self.turned), config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.has_query_latent = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent + self.turned, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, _LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.unturned + self.value), bias=False)
        self.into_latent = HeadProduct()
        self.out_of_latent = HeadProduct()
        self.o_proj = nn.Linear(self.heads * self.value, config.hidden_size, bias=config.attention_output_bias)
        self.scale = (self.unturned + self.turned) ** -0.5
        if config.rope_scaling.rope_type != "default" and config.rope_scaling.mscale_all_dim:
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None) -> Tensor:
        """Attend from every position to what it may see; returns (B, T, D)."""
        assert rotation is not None, "latent attention has rotary channels"
        if self.has_query_latent:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        else:
            query = self.q_proj(hidden_BTD)
        query_BHTC = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query_BHTN, query_BHTR = query_BHTC.split((self.unturned, self.turned), dim=-1)
        latent, key_R = self.kv_a_proj_with_mqa(hidden_BTD).split((self.latent, self.turned), dim=-1)
        latent_B1TL = self.kv_a_layernorm(latent)[:, None]
        key_B1TR = rotate(key_R[:, None], rotation, self.interleave)
        query_BHTR = rotate(query_BHTR, rotation, self.interleave)
        if cache is not None:
            attended_BHTV = self._in_the_latent(query_BHTN, query_BHTR, latent_B1TL, key_B1TR, mask, cache)
            return self.o_proj(attended_BHTV.transpose(1, 2).flatten(2))
        query_BHTC = torch.cat((query_BHTN, query_BHTR), dim=-1)
        key_value = self.kv_b_proj(latent_B1TL.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_BHSN, value_BHSV = key_value.split((self.unturned, self.value), dim=-1)
        key_BHSC = torch.cat((key_BHSN, key_B1TR.expand(-1, self.heads, -1, -1)), dim=-1)
        attended_BHTV = self.backend(query_BHTC, key_BHSC, value_BHSV, mask, Scores(self.scale))
        return self.o_proj(attended_BHTV.transpose(1, 2).flatten(2))

    def _in_the_latent(
        self, query_BHTN: Tensor, query_BHTR: Tensor, latent_B1TL: Tensor, key_B1TR: Tensor, mask: AttentionMask, cache: Cache
    ) -> Tensor:
        """The same with the cached latents as keys and values of all heads (DeepSeek-V2, appendix C), (B, H, T, V).

        With kₛ = A cₛ and vₛ = B cₛ, a score qᵀ k is (Aᵀ q)ᵀ cₛ, and the sum of values is B times the sum of latents: so keys
        and values of earlier tokens are never made again.
        """
        key_HNL, value_HVL = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.unturned, self.value), dim=1)
        query_BHTL = self.into_latent(query_BHTN, key_HNL)
        query_BHTC = torch.cat((query_BHTL, query_BHTR), dim=-1)
        key_B1TC = torch.cat((latent_B1TL, key_B1TR), dim=-1)
        inputs = AttentionInputs(query_BHTC, key_B1TC, latent_B1TL, mask, Scores(self.scale), self.backend)
        mixed_BHTL = cache.attend(self.layer, inputs)
        return self.out_of_latent(mixed_BHTL, value_HVL.transpose(1, 2))
