"""Folding of scales: where a block's activations can be scaled channel by channel without changing its outputs.

What makes the activations is divided by the scales, and every matrix that reads them has its columns multiplied by them.
Between the two stands nothing that mixes channels or is not linear: a norm's weight and the projections that read it, the
values and the output projection, the gated feed-forward's `up` and `down`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bessemer.model.attention import Attention
from bessemer.model.decoder import Block
from bessemer.model.delta_net import GatedDeltaNet
from bessemer.model.experts import SparseFeedForward
from bessemer.model.feed_forward import FeedForward
from bessemer.model.latent_attention import LatentAttention
from bessemer.model.norms import LayerNorm, RMSNorm

# Shapes: K channels of the activations (inputs of what reads them), P channels of what makes them, E experts.


@dataclass(frozen=True)
class Fold:
    """One place: `divide` divides what makes the activations by scales (P) and returns by how much it did; `readers` are the
    names, in the block, of the quantised matrices that read the activations, `others` of what else does.

    spread: from the makers' channels to the readers', where several readers' share one; gathered: back, as a mean.
    """

    channels: int
    divide: Callable[[Tensor], Tensor]
    readers: tuple[str, ...]
    others: tuple[str, ...] = ()
    spread: Callable[[Tensor], Tensor] = field(default=lambda scales: scales)
    gathered: Callable[[Tensor], Tensor] = field(default=lambda values: values)


def folds_of(block: Block) -> Iterator[Fold]:
    """The places of a block, in the order in which they are passed."""
    attention_norm, inner_norm = block.input_layernorm, block.post_attention_layernorm
    if block.is_linear:
        assert isinstance(block.linear_attn, GatedDeltaNet)
        yield from _after_norm(attention_norm, ("linear_attn.in_proj_qkvz",), ("linear_attn.in_proj_ba",))
    elif isinstance(block.self_attn, LatentAttention):
        yield from _of_latent(block.self_attn, attention_norm)
    else:
        assert isinstance(block.self_attn, Attention)
        yield from _after_norm(attention_norm, tuple(f"self_attn.{part}_proj" for part in "qkv"))
        yield _values(block.self_attn)
    if isinstance(block.mlp, SparseFeedForward):
        yield from _of_experts(block.mlp, inner_norm)
    else:
        yield from _after_norm(inner_norm, tuple(f"mlp.{name}" for name in _entries(block.mlp)))
        yield from _up_to_down(block.mlp, "mlp")


def _entries(feed_forward: FeedForward) -> tuple[str, ...]:
    return ("up_proj",) if feed_forward.gate_proj is None else ("gate_proj", "up_proj")


def _after_norm(norm: nn.Module, readers: tuple[str, ...], others: tuple[str, ...] = ()) -> Iterator[Fold]:
    """Nothing where the norm is absent: the readers are then given the residual stream."""
    if isinstance(norm, (RMSNorm, LayerNorm)):
        yield Fold(norm.weight.shape[0], lambda scales: _divide_norm(norm, scales), readers, others)


def _divide_norm(norm: RMSNorm | LayerNorm, scales_K: Tensor) -> Tensor:
    """Divides a norm's scale. What it was divided by is measured afterwards: in bfloat16 the quotient is rounded."""
    offset = 1.0 if isinstance(norm, RMSNorm) and norm.offset else 0.0
    before = norm.weight.detach().to(torch.float32) + offset
    norm.weight.data = (before / scales_K - offset).to(norm.weight.dtype)
    after = norm.weight.detach().to(torch.float32) + offset
    divided = torch.where((after != 0) & (before != 0), before / after, 1.0)
    if isinstance(norm, LayerNorm):
        norm.bias.data = (norm.bias.detach().to(torch.float32) / divided).to(norm.bias.dtype)
    return divided


def _divide_outputs(layer: nn.Linear, scales: Tensor) -> Tensor:
    """Divides a layer's outputs."""
    layer.weight.data = (layer.weight.data.to(torch.float32) / scales[:, None]).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data = (layer.bias.data.to(torch.float32) / scales).to(layer.bias.dtype)
    return scales


def _values(attention: Attention) -> Fold:
    """The values' channels, each read by as many query heads as share a key and value head."""
    width, channels = attention.v_proj.out_features, attention.head_dim
    shared = attention.o_proj.in_features // width

    def spread(scales: Tensor) -> Tensor:
        return scales.view(-1, 1, channels).expand(-1, shared, -1).flatten()

    def gathered(values: Tensor) -> Tensor:
        return values.view(-1, shared, channels).mean(1).flatten()

    return Fold(
        width,
        lambda scales: _divide_outputs(attention.v_proj, scales),
        ("self_attn.o_proj",),
        spread=spread,
        gathered=gathered,
    )


def _of_latent(attention: LatentAttention, norm: nn.Module) -> Iterator[Fold]:
    first = "self_attn.q_a_proj" if attention.has_query_latent else "self_attn.q_proj"
    yield from _after_norm(norm, (first, "self_attn.kv_a_proj_with_mqa"))
    if attention.has_query_latent:
        yield from _after_norm(attention.q_a_layernorm, ("self_attn.q_b_proj",))
    yield from _after_norm(attention.kv_a_layernorm, ("self_attn.kv_b_proj",))


def _up_to_down(feed_forward: FeedForward, name: str) -> Iterator[Fold]:
    """Nothing without a gate: an activation stands between."""
    if feed_forward.gate_proj is not None:
        up = feed_forward.up_proj
        yield Fold(up.out_features, lambda scales: _divide_outputs(up, scales), (f"{name}.down_proj",))


def _of_experts(mlp: SparseFeedForward, norm: nn.Module) -> Iterator[Fold]:
    """The norm before the router and all experts. Inside an expert nothing is scaled: few tokens visit each."""
    readers, others = ["mlp.experts.gate_up_proj"], ["mlp.router"]
    if mlp.shared_expert is not None:
        readers += [f"mlp.shared_expert.{part}" for part in _entries(mlp.shared_expert)]
    if mlp.shared_expert_gate is not None:
        others.append("mlp.shared_expert_gate")
    yield from _after_norm(norm, tuple(readers), tuple(others))
    if mlp.shared_expert is not None:
        yield from _up_to_down(mlp.shared_expert, "mlp.shared_expert")


def weight_in(block: Block, name: str) -> nn.Parameter:
    """The weight that a name of a `Fold` stands for, (N, K) or (E, N, K)."""
    found = block.get_submodule(name.rpartition(".")[0])
    last = getattr(found, name.rpartition(".")[2])
    weight = last if isinstance(last, nn.Parameter) else last.weight
    assert isinstance(weight, nn.Parameter), name
    return weight


def apply(fold: Fold, block: Block, scales_P: Tensor) -> Tensor:
    """Divide what makes the activations by the scales and multiply what reads them, in place; returns the scales (K)."""
    scales_K = fold.spread(fold.divide(scales_P))
    for name in (*fold.readers, *fold.others):
        weight = weight_in(block, name)
        weight.data = (weight.data.to(torch.float32) * scales_K).to(weight.dtype)
    return scales_K
