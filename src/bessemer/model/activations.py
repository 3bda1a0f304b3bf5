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

from typing import Literal

from bessemer.model.attention.base import variant_of
from bessemer.model.config import ModelConfig
from bessemer.model.parts import FLOAT32_BYTES, Numerics, StoredActivations

Recompute = Literal["none", "selective", "full"]

#: Bytes of an int64 index, of a chosen expert or of a visit.
_INDEX = 8


def block_activations(
    model: ModelConfig, layer: int, seen: int, numerics: Numerics, recompute: Recompute = "none", *, fused: bool = True
) -> StoredActivations:
    """Stored activations of one block for one token. seen: positions of a row on this rank, where scores are stored.

    fused: whether latent attention has a fused kernel (it has none on a CPU, and its scores are stored).
    """
    if recompute == "full":
        return StoredActivations(sequence=model.hidden_size * FLOAT32_BYTES)
    variant = variant_of(model, layer)
    if recompute == "selective":
        products = variant.recomputed_from(model, seen, numerics, fused=fused) + _feed_forward_products(model, layer, numerics)
        return StoredActivations(sequence=model.hidden_size * FLOAT32_BYTES) + products
    attention = variant.activations(model, seen, numerics, fused=fused)
    return _norm_activations(model, numerics) + attention + _feed_forward_activations(model, layer, numerics)


def mtp_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Activations of joining hidden states and the next token's embedding before each multi-token prediction block."""
    width = model.hidden_size
    return StoredActivations(sequence=3 * numerics.norm_bytes(model, width), inputs=2 * width * numerics.compute)


def final_norm_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Stored activations of the norm before the head."""
    return StoredActivations(sequence=numerics.norm_bytes(model, model.hidden_size))


def _norm_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """The norms on the residual stream. A norm after a module has its own input: the module's output in float32."""
    before, after = model.norm_position != "after", model.norm_position != "before"
    count = 2 * ((1 if before else 0) + (1 if after else 0))
    return StoredActivations(sequence=count * numerics.norm_bytes(model, model.hidden_size))


def _feed_forward_activations(model: ModelConfig, layer: int, numerics: Numerics) -> StoredActivations:
    if model.is_sparse(layer):
        return _expert_activations(model, numerics)
    return _dense_activations(model, model.intermediate_size, numerics)


def _dense_activations(model: ModelConfig, inner: int, numerics: Numerics) -> StoredActivations:
    c = numerics.compute
    if model.gated_mlp:
        # gate, its activation, up, and their product
        return numerics.matmul_inputs(model, 2) + StoredActivations(heads=4 * inner * c)
    kept = 1 if model.hidden_act == "relu" else 2
    return numerics.matmul_inputs(model, 1) + StoredActivations(heads=kept * inner * c)


def _expert_activations(model: ModelConfig, numerics: Numerics) -> StoredActivations:
    """Router, inputs, inner channels and outputs of the visits and their order, and the shared expert."""
    c, hidden, chosen, inner = numerics.compute, model.hidden_size, model.num_experts_per_tok, model.moe_intermediate_size
    router = (
        FLOAT32_BYTES * (2 if model.router_aux_loss_coef else 1) * model.num_experts
        + FLOAT32_BYTES * (chosen + 1)
        + _INDEX * chosen
    )
    router += FLOAT32_BYTES * model.num_experts if model.router_z_loss_coef or model.router_aux_loss_coef else 0
    # biases are float32, and so are the sums
    wide = FLOAT32_BYTES if model.expert_bias else c
    between = 6 if model.swiglu_limit is not None else 3
    visits = (hidden + inner) * c + (2 * hidden + between * inner + 1) * wide + (3 if model.expert_bias else 2) * _INDEX
    # the router reads float32
    kept = StoredActivations(sequence=router + hidden * FLOAT32_BYTES, heads=chosen * visits)
    shared = model.shared_expert_intermediate_size
    if shared:
        own = _dense_activations(model, shared, numerics)
        # in float32 the shared expert reads the router's input, which is counted
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
    kept = StoredActivations(sequence=FLOAT32_BYTES * model.num_experts, heads=chosen * (2 * inner + hidden) * c)
    return kept + (StoredActivations(heads=into * shared * c, inputs=hidden * c) if shared else StoredActivations())
