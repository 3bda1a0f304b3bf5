"""Activation memory: bytes that the forward pass stores for the backward pass, per token and block.

Korthikanti et al. 2022 count a GPT-3 block in half precision at 34 D + 5 H S bytes a token; here every architecture of
the decoder is counted by the same rule (each input that a backward formula needs, once a tensor), for PyTorch's kernels:
attention stores queries, keys, values, its output and a sum per head, never its scores; a matmul under autocast stores its
own copy of its input; norms and the residual stream are float32.

Tests compare with the live memory of real steps. Compiled blocks store less, since the compiler recomputes some of it: the
count is then an upper bound.

Symbols: D hidden, Q query channels, W key-value channels, H heads, S positions, I inner channels, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bessemer.model.config import ModelConfig

Recompute = Literal["none", "selective", "full"]

#: Bytes of float32: the residual stream, norms, the router, DeltaNet's state.
_FLOAT32_BYTES = 4
#: Bytes of an index.
_INDEX = 8
#: Tokens of a chunk of the delta rule (`model/layers/delta_net.py`).
_CHUNK = 64


@dataclass(frozen=True)
class StoredActivations:
    """Bytes per token, by how the tensor axis shards them.

    sequence: residual stream and norms, sharded by tokens. heads: sharded by heads or inner channels. inputs: of matmuls, for
    all tokens, replicated on the tensor axis.
    """

    sequence: float = 0.0
    heads: float = 0.0
    inputs: float = 0.0

    def __add__(self, other: StoredActivations) -> StoredActivations:
        return StoredActivations(self.sequence + other.sequence, self.heads + other.heads, self.inputs + other.inputs)

    def per_token(self, tensor: int = 1) -> float:
        """Bytes per token on a rank of the context axis, with `tensor` ranks of the tensor axis."""
        return (self.sequence + self.heads) / tensor + self.inputs


@dataclass(frozen=True)
class Numerics:
    """How activations are stored: bytes of a matmul's output (2 under autocast, else 4), and whether norms are one kernel."""

    compute: int = 2
    fused_norms: bool = True
    #: Whether modules read tokens gathered over the tensor axis in autocast's dtype, so that one copy serves all matmuls.
    gathered: bool = False

    @property
    def autocast(self) -> bool:
        """Whether matmuls run in a smaller dtype than that of the weights."""
        return self.compute != _FLOAT32_BYTES


def block_activations(
    model: ModelConfig, layer: int, seen: int, numerics: Numerics, recompute: Recompute = "none", *, fused: bool = True
) -> StoredActivations:
    """Stored activations of one block for one token. seen: positions of a row on this rank, where scores are stored.

    fused: whether latent attention has a fused kernel (it has none on a CPU, and its scores are stored).
    """
    if recompute == "full":
        return StoredActivations(sequence=model.hidden_size * _FLOAT32_BYTES)
    if recompute == "selective":
        products = _attention_products(model, layer, seen, numerics, fused) + _feed_forward_products(model, layer, numerics)
        return StoredActivations(sequence=model.hidden_size * _FLOAT32_BYTES) + products
    norms = _norm_activations(model, numerics)
    return (
        norms + _attention_activations(model, layer, seen, numerics, fused) + _feed_forward_activations(model, layer, numerics)
    )


def mtp_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Activations of joining hidden states and the next token's embedding before each multi-token prediction block."""
    width = model.hidden_size
    return StoredActivations(sequence=3 * _norm(model, width, numerics, owns_input=True), inputs=2 * width * numerics.compute)


def final_norm_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Stored activations of the norm before the head."""
    return StoredActivations(sequence=_norm(model, model.hidden_size, numerics, owns_input=True))


def _norm(model: ModelConfig, width: int, numerics: Numerics, *, owns_input: bool, rows: int = 1) -> float:
    """A norm of `width` channels: its input where nothing else stores it, its sums, and when unfused its unscaled output."""
    sums = (2 if model.norm_type == "layer" else 1) * rows
    unscaled = 0 if numerics.fused_norms or model.norm_type == "layer" else width
    return _FLOAT32_BYTES * ((width if owns_input else 0) + sums + unscaled)


def _norm_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """The norms on the residual stream. A norm after a module has its own input: the module's output in float32."""
    before, after = model.norm_position != "after", model.norm_position != "before"
    count = 2 * ((1 if before else 0) + (1 if after else 0))
    return StoredActivations(sequence=count * _norm(model, model.hidden_size, numerics, owns_input=True))


def _inputs(model: ModelConfig, products: int, numerics: Numerics) -> StoredActivations:
    """Stored inputs of `products` matmuls that read the same hidden states: one tensor, or under autocast a copy each."""
    width = model.hidden_size
    if numerics.autocast:
        return StoredActivations(inputs=(1 if numerics.gathered else products) * width * numerics.compute)
    # the output of a norm, or else the residual stream, which nothing else stores
    return StoredActivations(inputs=width * _FLOAT32_BYTES)


def _attention_activations(model: ModelConfig, layer: int, seen: int, numerics: Numerics, fused: bool) -> StoredActivations:
    if model.types[layer] == "linear_attention":
        return _delta_net_activations(model, numerics)
    if model.is_latent:
        return _latent_activations(model, seen, numerics, fused)
    c, heads = numerics.compute, model.num_attention_heads
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = _inputs(model, 3, numerics)
    if model.qk_norm == "head":
        normed = _norm(model, query, numerics, owns_input=True, rows=heads)
        kept += StoredActivations(
            heads=normed + _norm(model, key_value, numerics, owns_input=True, rows=model.num_key_value_heads)
        )
    elif model.qk_norm == "full":
        kept += StoredActivations(heads=sum(_norm(model, width, numerics, owns_input=True) for width in (query, key_value)))
    kept += StoredActivations(heads=_score_activations(model, seen, numerics))
    if model.attention_output_gate:
        # the gate's sigmoid and the product, which the projection reads
        kept += StoredActivations(heads=2 * query * c)
    return kept


def _is_explicit(model: ModelConfig) -> bool:
    """Whether attention is computed without a fused kernel, because PyTorch's kernels lack what the model needs."""
    return model.attention_sinks or model.attn_logit_softcapping is not None


def _score_activations(model: ModelConfig, seen: int, numerics: Numerics) -> float:
    """Queries, keys, values and output; and a sum per head, or all scores."""
    c, heads = numerics.compute, model.num_attention_heads
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if not _is_explicit(model):
        return c * (2 * query + 2 * key_value) + _FLOAT32_BYTES * heads
    # keys and values once a query head
    kept: float = c * 4 * query
    kept += _FLOAT32_BYTES * heads * seen + (
        c * heads * seen if numerics.autocast else 0
    )  # the softmax, and a copy for the product
    if model.attn_logit_softcapping is not None:
        kept += c * heads * seen
    return kept


def _attention_products(model: ModelConfig, layer: int, seen: int, numerics: Numerics, fused: bool) -> StoredActivations:
    """Outputs of matmuls and attention, which selective recomputation stores."""
    c, hidden, heads = numerics.compute, model.hidden_size, model.num_attention_heads
    if model.types[layer] == "linear_attention":
        return _delta_net_products(model, numerics)
    out = StoredActivations(inputs=hidden * c)
    if model.is_latent:
        assert model.kv_lora_rank is not None
        key = model.qk_nope_head_dim + model.qk_rope_head_dim
        narrow = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
        wide = heads * (key + model.qk_nope_head_dim + 2 * model.v_head_dim)
        scores = (
            _FLOAT32_BYTES * heads if fused else _FLOAT32_BYTES * heads * seen + heads * (_FLOAT32_BYTES - c) * model.v_head_dim
        )
        return out + StoredActivations(inputs=narrow * c, heads=wide * c + scores)
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    gate = query if model.attention_output_gate else 0
    scores = c * heads * seen if _is_explicit(model) else _FLOAT32_BYTES * heads
    return out + StoredActivations(heads=c * (2 * query + 2 * key_value + gate) + scores)


def _latent_activations(model: ModelConfig, seen: int, numerics: Numerics, fused: bool) -> StoredActivations:
    assert model.kv_lora_rank is not None
    c, heads, value = numerics.compute, model.num_attention_heads, model.v_head_dim
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    kept = _inputs(model, 2, numerics)
    for rank in (model.q_lora_rank, model.kv_lora_rank):
        if rank is not None:
            # a norm, and the product that reads it
            read = rank * c if numerics.autocast else rank * _FLOAT32_BYTES
            kept += StoredActivations(inputs=_norm(model, rank, numerics, owns_input=True) + read)
    if fused:
        return kept + StoredActivations(heads=c * heads * (2 * key + 2 * value) + _FLOAT32_BYTES * heads)
    # queries, keys, values and the softmax in float32, and what the last projection reads
    return kept + StoredActivations(heads=_FLOAT32_BYTES * heads * (2 * key + value + seen) + c * heads * value)


def _delta_net_widths(model: ModelConfig) -> tuple[int, int, int, int, int]:
    """Value heads, channels of a key and of a value, and all channels of the keys and of the values."""
    key, value, heads = model.linear_key_head_dim, model.linear_value_head_dim, model.linear_num_value_heads
    return heads, key, value, model.linear_num_key_heads * key, heads * value


def _delta_net_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Chunked Gated DeltaNet, float32 except for inputs of matmuls (in the order of `model/layers/delta_net.py`)."""
    c = numerics.compute
    heads, key, value, all_keys, all_values = _delta_net_widths(model)
    chunk, state = _CHUNK, heads * key * value / _CHUNK
    kept = _inputs(model, 2, numerics)
    convolved = 2 * (2 * all_keys + all_values) * c
    units = _FLOAT32_BYTES * (2 * all_keys + 2 * model.linear_num_key_heads + (0 if numerics.autocast else all_values))
    gates = _FLOAT32_BYTES * 7 * heads
    inside = _FLOAT32_BYTES * heads * (2 * chunk + 4 * key + 2 * value)
    products = heads * (4 * key + 2 * chunk) * c
    through: float = heads * (3 * key + (2 if numerics.autocast else 1) * value + chunk) * c
    through += state * (2 * c + _FLOAT32_BYTES if numerics.autocast else _FLOAT32_BYTES)
    normed = _FLOAT32_BYTES * ((4 if numerics.fused_norms else 5) * all_values + heads) + all_values * c
    return kept + StoredActivations(heads=convolved + units + gates + inside + products + through + normed)


def _delta_net_products(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    c = numerics.compute
    heads, key, value, all_keys, all_values = _delta_net_widths(model)
    projected = 2 * all_keys + 2 * all_values + 2 * heads
    inside = heads * (2 * _CHUNK + 3 * value) + heads * key * value / _CHUNK
    return StoredActivations(heads=c * (projected + inside), inputs=c * model.hidden_size)


def _feed_forward_activations(model: ModelConfig, layer: int, numerics: Numerics) -> StoredActivations:
    if model.is_sparse(layer):
        return _expert_activations(model, numerics)
    return _dense_activations(model, model.intermediate_size, numerics)


def _dense_activations(model: ModelConfig, inner: int, numerics: Numerics) -> StoredActivations:
    c = numerics.compute
    if model.gated_mlp:
        # gate, its activation, up, and their product
        return _inputs(model, 2, numerics) + StoredActivations(heads=4 * inner * c)
    kept = 1 if model.hidden_act == "relu" else 2
    return _inputs(model, 1, numerics) + StoredActivations(heads=kept * inner * c)


def _expert_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Router, inputs, inner channels and outputs of the visits and their order, and the shared expert."""
    c, hidden, chosen, inner = numerics.compute, model.hidden_size, model.num_experts_per_tok, model.moe_intermediate_size
    router = (
        _FLOAT32_BYTES * (2 if model.router_aux_loss_coef else 1) * model.num_experts
        + _FLOAT32_BYTES * (chosen + 1)
        + _INDEX * chosen
    )
    router += _FLOAT32_BYTES * model.num_experts if model.router_z_loss_coef or model.router_aux_loss_coef else 0
    # a bias is float32, and so is what it is added to
    wide = _FLOAT32_BYTES if model.expert_bias else c
    between = 6 if model.swiglu_limit is not None else 3
    visits = (hidden + inner) * c + (2 * hidden + between * inner + 1) * wide + (3 if model.expert_bias else 2) * _INDEX
    # the router reads float32
    kept = StoredActivations(sequence=router + hidden * _FLOAT32_BYTES, heads=chosen * visits)
    shared = model.shared_expert_intermediate_size
    if shared:
        own = _dense_activations(model, shared, numerics)
        # in float32 they read what the router reads
        kept += own if numerics.autocast else StoredActivations(heads=own.heads)
    if model.shared_expert_gate:
        kept += StoredActivations(sequence=c * (hidden + 1) + (hidden * c if numerics.autocast else 0))
    return kept


def _feed_forward_products(model: ModelConfig, layer: int, numerics: Numerics) -> StoredActivations:
    c, hidden = numerics.compute, model.hidden_size
    into = 2 if model.gated_mlp else 1
    if not model.is_sparse(layer):
        return StoredActivations(heads=into * model.intermediate_size * c, inputs=hidden * c)
    chosen, inner, shared = model.num_experts_per_tok, model.moe_intermediate_size, model.shared_expert_intermediate_size
    kept = StoredActivations(sequence=_FLOAT32_BYTES * model.num_experts, heads=chosen * (2 * inner + hidden) * c)
    return kept + (StoredActivations(heads=into * shared * c, inputs=hidden * c) if shared else StoredActivations())
