"""What the forward pass leaves behind for the backward: bytes a token and a block, counted on our decoder's own graph.

Korthikanti et al. 2022 count a GPT-3 block in half precision at 34 D + 5 H S bytes a token; here every architecture of
the decoder is counted by the same rule (each input that a backward formula needs, once a tensor), for PyTorch's kernels:
attention keeps queries, keys, values, its output and a sum a head, never its scores; a product under autocast keeps its
own copy of its input; norms work in float32, and so does the residual stream.

Tests compare with the live memory of real steps. Compiled blocks keep less: the compiler computes some of it again, and the
count is then an upper bound.

Symbols: D hidden, Q query channels, W key-value channels, H heads, S positions seen, I inner channels, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bessemer.model.config import ModelConfig

Recompute = Literal["none", "selective", "full"]

#: Bytes of float32: the residual stream, norms, the router, DeltaNet's state.
_FULL = 4
#: Bytes of an index.
_INDEX = 8
#: Tokens of a chunk of the delta rule (`model/delta_net.py`).
_CHUNK = 64


@dataclass(frozen=True)
class Kept:
    """Bytes a token, by how the tensor axis cuts them.

    sequence: residual stream and norms, which sequence parallelism cuts by tokens. heads: what is cut by heads or inner
    channels. inputs: what products read, gathered over the tokens again, whole on every rank of the tensor axis.
    """

    sequence: float = 0.0
    heads: float = 0.0
    inputs: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.sequence + other.sequence, self.heads + other.heads, self.inputs + other.inputs)

    def per_token(self, tensor: int = 1) -> float:
        """Bytes a token of the row's share that this rank's context has, over so many ranks of the tensor axis."""
        return (self.sequence + self.heads) / tensor + self.inputs


@dataclass(frozen=True)
class Numerics:
    """How values are kept: bytes of what products give (2 under autocast, else 4), and whether norms are one kernel."""

    compute: int = 2
    fused_norms: bool = True
    #: Whether parts read tokens gathered over the tensor axis, in the products' own type, so that one copy serves all.
    gathered: bool = False

    @property
    def autocast(self) -> bool:
        """Whether products run in a smaller type than the weights have."""
        return self.compute != _FULL


def block_kept(
    model: ModelConfig, layer: int, seen: int, numerics: Numerics, recompute: Recompute = "none", *, fused: bool = True
) -> Kept:
    """What one block keeps of one token. seen: positions of a row on this rank, where all scores are kept.

    fused: whether latent attention has a kernel (on a processor it has none, and its scores are kept).
    """
    if recompute == "full":
        return Kept(sequence=model.hidden_size * _FULL)
    if recompute == "selective":
        products = _attention_products(model, layer, seen, numerics, fused) + _feed_forward_products(model, layer, numerics)
        return Kept(sequence=model.hidden_size * _FULL) + products
    norms = _norms(model, numerics)
    return norms + _attention_kept(model, layer, seen, numerics, fused) + _feed_forward_kept(model, layer, numerics)


def ahead_kept(model: ModelConfig, numerics: Numerics) -> Kept:
    """What joining the trunk and the next token's embedding keeps, before each block that predicts further ahead."""
    width = model.hidden_size
    return Kept(sequence=3 * _norm(model, width, numerics, owns_input=True), inputs=2 * width * numerics.compute)


def final_norm_kept(model: ModelConfig, numerics: Numerics) -> Kept:
    """What the norm before the head keeps."""
    return Kept(sequence=_norm(model, model.hidden_size, numerics, owns_input=True))


def _norm(model: ModelConfig, width: int, numerics: Numerics, *, owns_input: bool, rows: int = 1) -> float:
    """A norm of `width` channels: its input where nothing else keeps it, its sums, and in parts its output unscaled."""
    sums = (2 if model.norm_type == "layer" else 1) * rows
    unscaled = 0 if numerics.fused_norms or model.norm_type == "layer" else width
    return _FULL * ((width if owns_input else 0) + sums + unscaled)


def _norms(model: ModelConfig, numerics: Numerics) -> Kept:
    """The norms on the residual stream. The one after a part has an input of its own: float32 of what the part gave."""
    before, after = model.norm_position != "after", model.norm_position != "before"
    count = 2 * ((1 if before else 0) + (1 if after else 0))
    return Kept(sequence=count * _norm(model, model.hidden_size, numerics, owns_input=True))


def _inputs(model: ModelConfig, products: int, numerics: Numerics) -> Kept:
    """What `products` that read the same hidden states keep of them: one tensor, or under autocast a copy each."""
    width = model.hidden_size
    if numerics.autocast:
        return Kept(inputs=(1 if numerics.gathered else products) * width * numerics.compute)
    return Kept(inputs=width * _FULL)  # behind a norm its output, else the residual stream: nobody else keeps it


def _attention_kept(model: ModelConfig, layer: int, seen: int, numerics: Numerics, fused: bool) -> Kept:
    if model.types[layer] == "linear_attention":
        return _delta_net_kept(model, numerics)
    if model.is_latent:
        return _latent_kept(model, seen, numerics, fused)
    c, heads = numerics.compute, model.num_attention_heads
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = _inputs(model, 3, numerics)
    if model.qk_norm == "head":
        normed = _norm(model, query, numerics, owns_input=True, rows=heads)
        kept += Kept(heads=normed + _norm(model, key_value, numerics, owns_input=True, rows=model.num_key_value_heads))
    elif model.qk_norm == "full":
        kept += Kept(heads=sum(_norm(model, width, numerics, owns_input=True) for width in (query, key_value)))
    kept += Kept(heads=_scores_kept(model, seen, numerics))
    if model.attention_output_gate:  # the gate's sigmoid and the product, which the projection reads
        kept += Kept(heads=2 * query * c)
    return kept


def _is_explicit(model: ModelConfig) -> bool:
    """Whether attention is computed step by step, because PyTorch's kernels cannot do what the model asks for."""
    return model.attention_sinks or model.attn_logit_softcapping is not None


def _scores_kept(model: ModelConfig, seen: int, numerics: Numerics) -> float:
    """Queries, keys, values and output; and a sum a head, or all scores."""
    c, heads = numerics.compute, model.num_attention_heads
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if not _is_explicit(model):
        return c * (2 * query + 2 * key_value) + _FULL * heads
    kept: float = c * 4 * query  # keys and values once a query head
    kept += _FULL * heads * seen + (c * heads * seen if numerics.autocast else 0)  # the softmax, and a copy for the product
    if model.attn_logit_softcapping is not None:
        kept += c * heads * seen
    return kept


def _attention_products(model: ModelConfig, layer: int, seen: int, numerics: Numerics, fused: bool) -> Kept:
    """Outputs of the products and of attention, which selective recomputation keeps."""
    c, hidden, heads = numerics.compute, model.hidden_size, model.num_attention_heads
    if model.types[layer] == "linear_attention":
        return _delta_net_products(model, numerics)
    out = Kept(inputs=hidden * c)
    if model.is_latent:
        assert model.kv_lora_rank is not None
        key = model.qk_nope_head_dim + model.qk_rope_head_dim
        narrow = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
        wide = heads * (key + model.qk_nope_head_dim + 2 * model.v_head_dim)
        scores = _FULL * heads if fused else _FULL * heads * seen + heads * (_FULL - c) * model.v_head_dim
        return out + Kept(inputs=narrow * c, heads=wide * c + scores)
    query, key_value = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    gate = query if model.attention_output_gate else 0
    scores = c * heads * seen if _is_explicit(model) else _FULL * heads
    return out + Kept(heads=c * (2 * query + 2 * key_value + gate) + scores)


def _latent_kept(model: ModelConfig, seen: int, numerics: Numerics, fused: bool) -> Kept:
    assert model.kv_lora_rank is not None
    c, heads, value = numerics.compute, model.num_attention_heads, model.v_head_dim
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    kept = _inputs(model, 2, numerics)
    for rank in (model.q_lora_rank, model.kv_lora_rank):
        if rank is not None:  # a norm, and the product that reads it
            read = rank * c if numerics.autocast else rank * _FULL
            kept += Kept(inputs=_norm(model, rank, numerics, owns_input=True) + read)
    if fused:
        return kept + Kept(heads=c * heads * (2 * key + 2 * value) + _FULL * heads)
    # queries, keys, values and the softmax in float32, and what the last projection reads
    return kept + Kept(heads=_FULL * heads * (2 * key + value + seen) + c * heads * value)


def _delta_net_widths(model: ModelConfig) -> tuple[int, int, int, int, int]:
    """Value heads, channels of a key and of a value, and all channels of the keys and of the values."""
    key, value, heads = model.linear_key_head_dim, model.linear_value_head_dim, model.linear_num_value_heads
    return heads, key, value, model.linear_num_key_heads * key, heads * value


def _delta_net_kept(model: ModelConfig, numerics: Numerics) -> Kept:
    """Gated DeltaNet in chunks, float32 but for the inputs of products (`model/delta_net.py`, in its order)."""
    c = numerics.compute
    heads, key, value, all_keys, all_values = _delta_net_widths(model)
    chunk, state = _CHUNK, heads * key * value / _CHUNK
    kept = _inputs(model, 2, numerics)
    convolved = 2 * (2 * all_keys + all_values) * c
    units = _FULL * (2 * all_keys + 2 * model.linear_num_key_heads + (0 if numerics.autocast else all_values))
    gates = _FULL * 7 * heads
    inside = _FULL * heads * (2 * chunk + 4 * key + 2 * value)
    products = heads * (4 * key + 2 * chunk) * c
    through: float = heads * (3 * key + (2 if numerics.autocast else 1) * value + chunk) * c
    through += state * (2 * c + _FULL if numerics.autocast else _FULL)
    normed = _FULL * ((4 if numerics.fused_norms else 5) * all_values + heads) + all_values * c
    return kept + Kept(heads=convolved + units + gates + inside + products + through + normed)


def _delta_net_products(model: ModelConfig, numerics: Numerics) -> Kept:
    c = numerics.compute
    heads, key, value, all_keys, all_values = _delta_net_widths(model)
    projected = 2 * all_keys + 2 * all_values + 2 * heads
    inside = heads * (2 * _CHUNK + 3 * value) + heads * key * value / _CHUNK
    return Kept(heads=c * (projected + inside), inputs=c * model.hidden_size)


def _feed_forward_kept(model: ModelConfig, layer: int, numerics: Numerics) -> Kept:
    if model.is_sparse(layer):
        return _experts_kept(model, numerics)
    return _dense_kept(model, model.intermediate_size, numerics)


def _dense_kept(model: ModelConfig, inner: int, numerics: Numerics) -> Kept:
    c = numerics.compute
    if model.gated_mlp:  # gate, its activation, up, and their product
        return _inputs(model, 2, numerics) + Kept(heads=4 * inner * c)
    kept = 1 if model.hidden_act == "relu" else 2
    return _inputs(model, 1, numerics) + Kept(heads=kept * inner * c)


def _experts_kept(model: ModelConfig, numerics: Numerics) -> Kept:
    """Router, the visits' inputs, inner channels and outputs, their order; and the expert that every token visits."""
    c, hidden, chosen, inner = numerics.compute, model.hidden_size, model.num_experts_per_tok, model.moe_intermediate_size
    router = _FULL * (2 if model.router_aux_loss_coef else 1) * model.num_experts + _FULL * (chosen + 1) + _INDEX * chosen
    router += _FULL * model.num_experts if model.router_z_loss_coef or model.router_aux_loss_coef else 0
    wide = _FULL if model.expert_bias else c  # a bias is float32, and so is what it is added to
    between = 6 if model.swiglu_limit is not None else 3
    visits = (hidden + inner) * c + (2 * hidden + between * inner + 1) * wide + (3 if model.expert_bias else 2) * _INDEX
    kept = Kept(sequence=router + hidden * _FULL, heads=chosen * visits)  # the router reads float32
    shared = model.shared_expert_intermediate_size
    if shared:
        own = _dense_kept(model, shared, numerics)
        kept += own if numerics.autocast else Kept(heads=own.heads)  # in float32 they read what the router reads
    if model.shared_expert_gate:
        kept += Kept(sequence=c * (hidden + 1) + (hidden * c if numerics.autocast else 0))
    return kept


def _feed_forward_products(model: ModelConfig, layer: int, numerics: Numerics) -> Kept:
    c, hidden = numerics.compute, model.hidden_size
    into = 2 if model.gated_mlp else 1
    if not model.is_sparse(layer):
        return Kept(heads=into * model.intermediate_size * c, inputs=hidden * c)
    chosen, inner, shared = model.num_experts_per_tok, model.moe_intermediate_size, model.shared_expert_intermediate_size
    kept = Kept(sequence=_FULL * model.num_experts, heads=chosen * (2 * inner + hidden) * c)
    return kept + (Kept(heads=into * shared * c, inputs=hidden * c) if shared else Kept())
