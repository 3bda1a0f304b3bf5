"""A decoder with quantised weights: which can be quantised, the modules in their place, and dequantised matmuls.

Norms, biases, the router, DeltaNet's convolution and gates, and the gate of a shared expert stay as they are: they are small,
and much hangs on each of their numbers.

Where no kernels multiply by the codes, weights are dequantised once: in every matmul that would take longer than all the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.feed_forward import Experts
from bessemer.model.quantisation.base import Codes, Scheme
from bessemer.model.quantisation.quantised_layers import (
    PackedMatmuls,
    Product,
    QuantisedEmbedding,
    QuantisedExperts,
    QuantisedLinear,
    QuantisedStack,
    QuantisedWeight,
    is_quantised,
    quantised_parts,
)

EMBEDDING, HEAD = "embed_tokens", "lm_head"
#: The scalar head of a reward model is not quantised: differences of rewards count.
_SCORE = "score"
_KEPT = ("shared_expert_gate", "in_proj_ba")
_EXPERT_MATRICES = ("gate_up_proj", "down_proj")


def quantisable(decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the blocks that can be quantised, in the order of the network.

    A linear layer is named as its module; an expert's matrices, (E, N, K), as `experts.gate_up_proj` and `.down_proj`.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, Experts):
            for matrix in _EXPERT_MATRICES:
                yield f"{name}.{matrix}", tuple(getattr(module, matrix).shape)
        elif isinstance(module, nn.Linear) and name not in (HEAD, _SCORE) and not name.endswith(_KEPT):
            yield name, tuple(module.weight.shape)


def weight_name(module: str) -> str:
    """The name of a quantised weight among the tensors of a decoder that is not quantised."""
    return module if module.endswith(tuple(f".experts.{matrix}" for matrix in _EXPERT_MATRICES)) else f"{module}.weight"


def replace_with_quantised_modules(decoder: Decoder, schemes: Mapping[str, Scheme]) -> Decoder:
    """Replace the modules whose weights are named in `schemes` by quantised ones, in place; biases stay.

    The codes are zeros until they are loaded or taken. A new module is on the device of the weight that it replaces.
    """
    for name, scheme in schemes.items():
        parent_name, _, last = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        if isinstance(parent, Experts):
            if last == _EXPERT_MATRICES[0] and not isinstance(parent, QuantisedExperts):
                outer_name, _, own = parent_name.rpartition(".")
                with parent.gate_up_proj.device:
                    quantised = QuantisedExperts(parent, scheme, schemes[f"{parent_name}.{_EXPERT_MATRICES[1]}"])
                setattr(decoder.get_submodule(outer_name), own, quantised)
            continue
        setattr(parent, last, _quantised_module(cast(nn.Module, getattr(parent, last)), scheme))
    return decoder


def _quantised_module(module: nn.Module, scheme: Scheme) -> QuantisedLinear:
    assert isinstance(module, (nn.Linear, nn.Embedding)), module
    outputs, inputs = module.weight.shape
    made = QuantisedEmbedding if isinstance(module, nn.Embedding) else QuantisedLinear
    bias = module.bias if isinstance(module, nn.Linear) else None
    with module.weight.device:
        quantised = made(inputs, outputs, scheme, bias=bias is not None, dtype=module.weight.dtype)
    if bias is not None:
        quantised.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return quantised.train(module.training)


def set_dtype(decoder: Decoder, dtype: torch.dtype) -> None:
    """Set the type that codes are dequantised to: the rest of the model's."""
    for part in quantised_parts(decoder).values():
        part.dtype = dtype


def dequantised_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The tensors of a decoder by the names of one that is not quantised, dequantised."""
    parts = quantised_parts(decoder)
    buffers = {f"{name}.{buffer}" for name, part in parts.items() for buffer, _ in part.named_buffers()}
    tensors = {name: tensor for name, tensor in decoder.state_dict().items() if name not in buffers}
    return tensors | {weight_name(name): part.weight for name, part in parts.items()}


def dequantised(decoder: Decoder) -> Decoder:
    """The same model with ordinary weights; itself where it has no others."""
    if not is_quantised(decoder):
        return decoder
    return fill(empty_decoder(decoder.config), dequantised_tensors(decoder)).to(decoder.device)


# Shapes: N outputs, K inputs.

_SMALLEST = torch.finfo(torch.float32).tiny


def decoded_products(model: Decoder, dtype: torch.dtype | None) -> PackedMatmuls:
    """Dequantise the weights of every quantised layer, in float16 or float32 and multiplied as by `product`; dtype None: in the
    layer's own type, and multiplied as the layer does.

    Codes that meet quantised activations are `widened` where PyTorch would widen them at each product. Tables of which only
    rows are read stay as they are. The weights are copies: a change of the codes shows in new matmuls.
    """
    products: dict[QuantisedLinear, Product] = {}
    stacks: dict[QuantisedStack, list[Product]] = {}
    for part in _decoded(model):
        if isinstance(part, QuantisedStack):
            stacks[part] = [_product(layer, dtype) for layer in part.matrices]
        else:
            assert isinstance(part, QuantisedLinear)
            products[part] = _product(part, dtype)
    return PackedMatmuls(products, stacks, read_weights(model))


def read_weights(model: Decoder) -> dict[QuantisedLinear, Tensor]:
    """Weights of quantised layers that attention reads themselves, dequantised."""
    layers = [layer for module in model.modules() if isinstance(module, AttentionLayer) for layer in module.read_weights]
    return {layer: layer.weight for layer in layers if isinstance(layer, QuantisedLinear)}


def decoded_bytes(model: Decoder, dtype: torch.dtype | None) -> int:
    """Memory that the weights of `decoded_products` take."""
    types = [(part, torch.float32 if not part.scheme.is_weight_only else dtype or part.dtype) for part in _decoded(model)]
    return sum(prod(part.shape) * own.itemsize for part, own in types)


def _decoded(model: Decoder) -> list[QuantisedWeight]:
    """The parts whose weights are read out, or widened."""
    return [
        part
        for part in quantised_parts(model).values()
        if (part.scheme.is_weight_only or _is_widened(part))
        and (part is model.head or not isinstance(part, QuantisedEmbedding))
    ]


def _is_widened(part: QuantisedWeight) -> bool:
    # one row tells
    one = Codes(part.scheme, {name: tensor[:1] for name, tensor in part.stored.tensors.items()})
    return part.scheme.widened(one) is not None


def _product(layer: QuantisedLinear, dtype: torch.dtype | None) -> Product:
    if not layer.scheme.is_weight_only:
        widened = layer.scheme.widened(layer.stored)
        assert widened is not None, layer.scheme
        return partial(_widened_product, layer.scheme, widened, layer.bias)
    if dtype is None:
        return partial(_own_product, layer.weight, layer.bias)
    return partial(product, layer.stored.dequantised().to(dtype), layer.bias)


def _widened_product(scheme: Scheme, widened: Codes, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    return scheme.product(hidden, widened, bias_N)


def _own_product(weight_NK: Tensor, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    bias_N = None if bias_N is None else bias_N.to(hidden.dtype)
    return functional.linear(hidden, weight_NK.to(hidden.dtype), bias_N)


def product(weight_NK: Tensor, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    """hidden (…, K) by weights in float16 or float32, and a bias, in the type of `hidden`.

    One row meets float16 as it is, divided by its largest magnitude, which keeps every number in range: PyTorch then reads half
    as much. Several rows meet weights that are widened for them: of products of matrices it has fast ones in float32.
    """
    wide = hidden.to(torch.float32)
    if weight_NK.dtype == torch.float16 and wide.numel() == wide.shape[-1]:
        scale = torch.linalg.vector_norm(wide, math.inf).clamp_(min=_SMALLEST)
        out = functional.linear((wide / scale).to(torch.float16), weight_NK).to(torch.float32).mul_(scale)
    else:
        out = functional.linear(wide, weight_NK.to(torch.float32))
    return (out if bias_N is None else out + bias_N).to(hidden.dtype)
