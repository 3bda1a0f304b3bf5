"""Matmuls of a model's quantised layers by weights that are dequantised once.

Where no kernels multiply by the codes, dequantising in every matmul takes longer than all the rest.
"""

from __future__ import annotations

import math
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.latent_attention import LatentAttention
from bessemer.model.quantised_experts import QuantisedStack
from bessemer.model.quantised_linear import (
    PackedMatmuls,
    Product,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
    quantised_parts,
)

# Shapes: N outputs, K inputs.

_SMALLEST = torch.finfo(torch.float32).tiny


def decoded_products(model: Decoder, dtype: torch.dtype) -> PackedMatmuls:
    """Dequantise the weights of every quantised layer, in float16 or float32.

    Layers whose activations are quantised too, and tables of which only rows are read, stay as they are. The weights are
    copies: a change of the codes shows in new matmuls.
    """
    products: dict[QuantisedLinear, Product] = {}
    stacks: dict[QuantisedStack, list[Product]] = {}
    for part in _decoded(model):
        if isinstance(part, QuantisedStack):
            stacks[part] = [_product(layer, dtype) for layer in part.matrices]
        else:
            assert isinstance(part, QuantisedLinear)
            products[part] = _product(part, dtype)
    weights: dict[QuantisedLinear, Tensor] = {}
    for module in model.modules():
        if isinstance(module, LatentAttention) and isinstance(module.kv_b_proj, QuantisedLinear):
            weights[module.kv_b_proj] = module.kv_b_proj.weight
    return PackedMatmuls(products, stacks, weights)


def decoded_bytes(model: Decoder, dtype: torch.dtype) -> int:
    """Memory that the weights of `decoded_products` take."""
    return sum(prod(part.shape) for part in _decoded(model)) * dtype.itemsize


def _decoded(model: Decoder) -> list[QuantisedWeight]:
    """The parts whose weights are read out."""
    return [
        part
        for part in quantised_parts(model).values()
        if part.scheme.is_weight_only and (part is model.head or not isinstance(part, QuantisedEmbedding))
    ]


def _product(layer: QuantisedLinear, dtype: torch.dtype) -> Product:
    return partial(product, layer.stored.dequantised().to(dtype), layer.bias)


def product(weight_NK: Tensor, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    """hidden (…, K) by weights in float16 or float32, and a bias, in the type of `hidden`.

    One row meets float16 as it is, divided by its largest magnitude, which keeps every number in range: PyTorch then reads half
    as much. Several rows meet weights that are widened for them: of products of matrices it has fast ones in float32.
    """
    wide = hidden.to(torch.float32)
    if weight_NK.dtype == torch.float16 and wide.numel() == wide.shape[-1]:
        scale = torch.linalg.vector_norm(wide, math.inf).clamp_(min=_SMALLEST)
        found = functional.linear((wide / scale).to(torch.float16), weight_NK).to(torch.float32).mul_(scale)
    else:
        found = functional.linear(wide, weight_NK.to(torch.float32))
    return (found if bias_N is None else found + bias_N).to(hidden.dtype)
