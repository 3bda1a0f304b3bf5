"""One token's way through the model: what each layer adds to its logit, by its attention, its heads and its feed-forward.

The residual stream before the last norm is a sum, h = embedding + Σ parts. With the norm's scale as it is at that token the
logit is linear in it, so every part has a share in the logit (direct logit attribution: Elhage et al. 2021). The shares sum to
the logit, before a softcap and without what a LayerNorm's bias adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_backends import capped
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.layers.norms import LayerNorm, RMSNorm
from bessemer.model.quantisation.quantised_layers import QuantisedLinear

# Shapes: L layers and one more for the embedding, N parts, H heads, W channels of a value head, D hidden, V vocabulary.


@dataclass(frozen=True)
class LayerParts:
    """What one layer adds to a token's logit. heads_H: of its attention, without a bias that is no head's."""

    layer: int
    attention: float
    feed_forward: float
    heads_H: list[float]


def shares_of_norm(norm: nn.Module, parts_ND: Tensor, at_D: Tensor) -> Tensor:
    """What a norm makes of parts of a vector, (N, D), with its scale as it is at the whole; without a LayerNorm's bias."""
    if isinstance(norm, RMSNorm):
        scale_D = norm.weight.float() + (1 if norm.offset else 0)
        return parts_ND * scale_D * (norm.multiplier * torch.rsqrt(at_D.square().mean() + norm.eps))
    if isinstance(norm, LayerNorm):
        centred_ND = parts_ND - parts_ND.mean(-1, keepdim=True)
        deviation = torch.rsqrt((at_D - at_D.mean()).square().mean() + norm.eps)
        return centred_ND * norm.weight.float() * (norm.multiplier * deviation)
    assert isinstance(norm, nn.Identity), norm
    return parts_ND


@torch.no_grad()
def logit_shares(model: Decoder, parts_ND: Tensor, final_D: Tensor, token: int) -> list[float]:
    """The share of each part of the residual stream, (N, D), in a token's logit before any softcap. final_D: their sum."""
    normed_ND = shares_of_norm(model.norm, parts_ND.float(), final_D.float())
    return [float(share) for share in normed_ND.to(model.device) @ _head_row(model, token)]


def _head_row(model: Decoder, token: int) -> Tensor:
    """The head's weights of one token, (D,) float32."""
    head = model.head
    if isinstance(head, QuantisedLinear):
        return head.weight_rows(torch.tensor([token], device=head.device))[0].float()
    return model.head_weight[token].float()


@torch.no_grad()
def logit_without_rounding(model: Decoder, final_D: Tensor, token: int) -> float:
    """A token's logit from the residual stream after all layers, in float32, where a quantised head's product may round its
    inputs."""
    normed_D = model.normed(final_D.to(model.device, model.dtype)).float()
    return float(capped(normed_D @ _head_row(model, token), model.logit_softcap))


def layer_shares(model: Decoder, states_LD: Tensor, token: int) -> list[float]:
    """The shares of the embedding and of every layer in a token's logit, from the residual stream before each and after all."""
    parts_LD = torch.cat((states_LD[:1], states_LD.diff(dim=0)))
    return logit_shares(model, parts_LD, states_LD[-1], token)


@torch.no_grad()
def layer_parts(
    model: Decoder, tokens: Sequence[int], token: int, on_layer: Callable[[int, int], None] | None = None
) -> Iterator[LayerParts]:
    """The shares of each layer's attention, heads and feed-forward in the logit of a token behind these.

    on_layer: called before each layer is computed, with its number and how many there are. The model is read once, and then
    split layer by layer.
    """
    added: dict[tuple[int, str], Tensor] = {}
    heads: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hooks.callback(
                block.attention_output_norm.register_forward_hook(partial(_keep, added, (layer, "attention"))).remove
            )
            hooks.callback(block.feed_forward_output_norm.register_forward_hook(partial(_keep, added, (layer, "mlp"))).remove)
            hooks.callback(block.attention_output_norm.register_forward_pre_hook(partial(_keep_given, added, layer)).remove)
            hooks.callback(block.attention.output[0].register_forward_pre_hook(partial(_keep_heads, heads, layer)).remove)
        cache = DecoderCache(model.config, 1, len(tokens), model.dtype, model.device)

        def keep(layer: int, _: Tensor) -> None:
            if on_layer is not None:
                on_layer(layer, len(model.blocks))

        row_BT = torch.tensor([list(tokens)], device=model.device)
        final_D = model.pre_norm_hidden(row_BT, cache=cache, keep=keep)[0, -1]
    for layer, block in enumerate(model.blocks):
        projection, count = block.attention.output
        each_HD = functional.linear(_one_head_a_row(heads[layer], count), projection.weight)
        each_HD = shares_of_norm(block.attention_output_norm, each_HD, added[layer, "given"])
        parts_ND = torch.cat((added[layer, "attention"][None], added[layer, "mlp"][None], each_HD)) * block.residual_multiplier
        attention, feed_forward, *of_heads = logit_shares(model, parts_ND, final_D, token)
        yield LayerParts(layer, attention, feed_forward, of_heads)


def _keep(added: dict[tuple[int, str], Tensor], name: tuple[int, str], norm: nn.Module, given: Any, out_BTD: Tensor) -> None:
    added[name] = out_BTD[0, -1].clone()


def _keep_given(added: dict[tuple[int, str], Tensor], layer: int, norm: nn.Module, given: tuple[Tensor]) -> None:
    added[layer, "given"] = given[0][0, -1].clone()


def _keep_heads(heads: dict[int, Tensor], layer: int, projection: nn.Module, given: tuple[Tensor]) -> None:
    heads[layer] = given[0].flatten(0, -2)[-1].clone()


def _one_head_a_row(heads_HW: Tensor, count: int) -> Tensor:
    """(H·W,) → (H, H·W): each row has the channels of one head, and 0 elsewhere."""
    return torch.block_diag(*heads_HW.unflatten(0, (count, -1)))
