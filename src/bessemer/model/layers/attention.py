"""Attention modules: grouped-query attention and multi-head latent attention.

Grouped-query attention (Ainslie et al. 2023) is causal attention (Vaswani et al. 2017) whose groups of query heads share keys
and values. Latent attention (DeepSeek-V2, section 2.1) makes keys and values from one narrow vector per token and caches only
that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.adapters import AdapterRows, Hook
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_backends import AttentionBackend, Scores, sdpa
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.cache import AttentionInputs, Cache
from bessemer.model.layers.norms import Fold, RMSNorm, after_norm, divide_outputs, make_norm
from bessemer.model.layers.positions import Rotation, rotate, yarn_mscale

# Shapes: B batch, T time, S positions seen, D hidden, H query heads, K key-value heads, C channels of a head, R rank.

#: Draws the initial values of a tensor of a shape.
InitialDraw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The initial values of norms that store their weight whole, whatever `norm_offset` says."""
    return torch.ones(shape)


class TensorSharder(Protocol):
    """What `AttentionLayer.shard` asks of the tensor axis (`distributed/tensor.py`)."""

    @property
    def rank(self) -> int:
        """This process on the axis."""

    @property
    def ranks(self) -> int:
        """Processes on the axis."""

    def shard_outputs(self, *linears: nn.Module) -> None:
        """Shard the outputs of linear layers."""

    def shard_inputs(self, linear: nn.Module) -> None:
        """Shard the inputs of a linear layer, and sum its outputs over the ranks."""

    def shard_parameters(self, module: nn.Module, **dims: int | None) -> None:
        """Shard parameters of a module along dimensions; None: replicate."""

    def replicate(self, *modules: nn.Module) -> None:
        """Keep all parameters of modules on every rank."""

    def use_rows(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Let a module see some rows of a replicated parameter."""

    def norm_over_ranks(self, *norms: nn.Module) -> None:
        """Shard norms over the channels of all heads."""

    def gather_inputs(self, module: nn.Module, *, cast: bool = True) -> None:
        """Give a module all tokens. cast: in autocast's dtype."""


class AttentionLayer(nn.Module):
    """The module of an attention variant, and what the rest of the code asks of it (`model/attention` describes it in figures).

    `forward` attends from every position to what it may see, (B, T, D). rotation: of the positions; None where the layer has
    none. A layer with a state reads nothing of the mask but its documents.
    """

    #: How scores become outputs; None in a layer that has no scores.
    backend: AttentionBackend | None = None
    #: Initial draws of tensors that are not drawn as others, by the end of their names.
    initial: ClassVar[Mapping[str, InitialDraw]] = {}

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None) -> Tensor:
        raise NotImplementedError

    @property
    def output(self) -> tuple[nn.Linear, int]:
        """The projection that reads the outputs of all heads, and the number of heads."""
        raise NotImplementedError

    @property
    def read_weights(self) -> list[nn.Module]:
        """Linear layers whose weights are read themselves, beside or in place of their products."""
        return []

    def shard(self, sharder: TensorSharder) -> None:
        """Shard the parameters by heads over the tensor axis, in place."""
        raise NotImplementedError

    def folds(self, norm: nn.Module) -> Iterator[Fold]:
        """Where activations can be scaled. norm: the one before the layer. Names are relative to the layer."""
        yield from ()

    def adapter_hooks(self, child: str, rows: Sequence[AdapterRows]) -> Iterator[tuple[nn.Module, Hook]]:
        """Hooks that apply the updates of a linear layer where its weight is used and not its output."""
        yield from ()


class Attention(AttentionLayer):
    """softmax(q kᵀ / √C) v, where H / K query heads share a key and a value head.

    K = H is multi-head attention, K = 1 multi-query attention. Queries and keys may be normed (Dehghani et al. 2023), over
    each head or over all, before they are turned; or, without a weight, after (`unit`, and not where they are not turned).
    """

    initial: ClassVar[Mapping[str, InitialDraw]] = {"sinks": lambda shape, generator: torch.zeros(shape)}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.backend: AttentionBackend = sdpa
        self.interleave = config.rope_interleave
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.has_gate = config.attention_output_gate
        # each head's rows of the gate follow its rows of the query
        self.q_proj = nn.Linear(config.hidden_size, query_width * (2 if self.has_gate else 1), bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_output_bias)
        self.qk_norm = config.qk_norm
        self.norm_eps = config.rms_norm_eps
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
            if self.qk_norm == "unit":
                query_BHTC, key_BKTC = (self._unit(heads) for heads in (query_BHTC, key_BKTC))
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

    def _unit(self, heads: Tensor) -> Tensor:
        """Heads (…, C) with a mean square of 1."""
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)).to(heads.dtype)

    @property
    def output(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.o_proj.in_features // self.head_dim

    def shard(self, sharder: TensorSharder) -> None:
        sharder.shard_outputs(self.q_proj, self.k_proj, self.v_proj)
        sharder.shard_inputs(self.o_proj)
        sharder.shard_parameters(self, sinks=0)
        if self.qk_norm == "head":
            sharder.replicate(self.q_norm, self.k_norm)
        elif self.qk_norm == "full":
            sharder.norm_over_ranks(self.q_norm, self.k_norm)
        sharder.gather_inputs(self)

    def folds(self, norm: nn.Module) -> Iterator[Fold]:
        yield from after_norm(norm, ("q_proj", "k_proj", "v_proj"))
        # the values' channels, each read by as many query heads as share a key and value head
        width, channels = self.v_proj.out_features, self.head_dim
        shared = self.o_proj.in_features // width
        yield Fold(
            width,
            lambda scales: divide_outputs(self.v_proj, scales),
            ("o_proj",),
            spread=lambda scales: scales.view(-1, 1, channels).expand(-1, shared, -1).flatten(),
            gathered=lambda values: values.view(-1, shared, channels).mean(1).flatten(),
        )


# Shapes: B batch, T time, S positions seen, D hidden, L latent, H heads, N channels without position, R with, V of a value.
# fixed in DeepSeek-V3, whatever the other norms use
_LATENT_NORM_EPS = 1e-6


class HeadProduct(nn.Module):
    """vectors · matrix, head by head: a module so that adapters of `kv_b_proj` can add to it."""

    def forward(self, vectors_BHTI: Tensor, matrix_HIO: Tensor) -> Tensor:
        """(B, H, T, I) to (B, H, T, O), in the type of the vectors."""
        return vectors_BHTI @ matrix_HIO.to(vectors_BHTI.dtype)


class LatentAttention(AttentionLayer):
    """Every head has N channels without position, made from the latent, and R rotary ones; the key's rotary channels are
    one vector that all heads share.
    """

    initial: ClassVar[Mapping[str, InitialDraw]] = {"q_a_layernorm.weight": ones, "kv_a_layernorm.weight": ones}

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

    @property
    def output(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.heads

    @property
    def read_weights(self) -> list[nn.Module]:
        return [self.kv_b_proj]

    def shard(self, sharder: TensorSharder) -> None:
        # the latents, which all heads share, are computed on every rank
        for name, part in self.named_children():
            if name in ("q_proj", "q_b_proj", "kv_b_proj"):
                sharder.shard_outputs(part)
            elif name != "o_proj":
                sharder.replicate(part)
        sharder.shard_inputs(self.o_proj)
        self.heads //= sharder.ranks
        sharder.gather_inputs(self)

    def folds(self, norm: nn.Module) -> Iterator[Fold]:
        yield from after_norm(norm, ("q_a_proj" if self.has_query_latent else "q_proj", "kv_a_proj_with_mqa"))
        if self.has_query_latent:
            yield from after_norm(self.q_a_layernorm, ("q_b_proj",))
        yield from after_norm(self.kv_a_layernorm, ("kv_b_proj",))

    def adapter_hooks(self, child: str, rows: Sequence[AdapterRows]) -> Iterator[tuple[nn.Module, Hook]]:
        """`kv_b_proj` makes keys and values out of latents. With a cache its two halves are applied to queries, and to sums of
        latents, head by head; so are those of its updates. Gains multiply what the rows of a weight meet: the channels of
        queries before, those of values after."""
        if child != "kv_b_proj":
            return
        halves = []
        for update, gain_N, rows_M in rows:
            up_HCR = update.up_NR.unflatten(0, (self.heads, -1))
            gain_HC = None if gain_N is None else gain_N.unflatten(0, (self.heads, -1))
            halves.append((update, up_HCR, gain_HC, slice(None) if rows_M is None else rows_M))
        unturned = self.unturned

        def into_latent(module: nn.Module, inputs: tuple[Tensor, Tensor], out_BHTL: Tensor) -> None:
            for update, up_HCR, gain_HC, rows in halves:
                queries_BHTC = inputs[0][:, :, rows]
                if gain_HC is not None:
                    queries_BHTC = queries_BHTC * gain_HC[:, None, :unturned]
                    out_BHTL[:, :, rows] = module.forward(queries_BHTC, inputs[1])
                out_BHTL[:, :, rows] += (queries_BHTC @ up_HCR[:, :unturned]) @ update.down_RK * update.scale

        def out_of_latent(module: nn.Module, inputs: tuple[Tensor, Tensor], out_BHTC: Tensor) -> None:
            for update, up_HCR, gain_HC, rows in halves:
                narrow_BHTR = functional.linear(inputs[0][:, :, rows], update.down_RK)
                out_BHTC[:, :, rows] += narrow_BHTR @ up_HCR[:, unturned:].transpose(1, 2) * update.scale
                if gain_HC is not None:
                    out_BHTC[:, :, rows] *= gain_HC[:, None, unturned:]

        yield self.into_latent, into_latent
        yield self.out_of_latent, out_of_latent
