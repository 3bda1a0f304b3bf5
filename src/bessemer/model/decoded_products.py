"""The products of a model's quantised layers by weights that are read out of their codes once."""

from __future__ import annotations

from functools import partial
from math import prod

from torch import Tensor
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.quantised_experts import QuantisedStack
from bessemer.model.quantised_linear import Lent, Product, QuantisedEmbedding, QuantisedLinear, QuantisedWeight, quantised_parts

# Shapes: N outputs, K inputs.


def decoded_products(model: Decoder) -> Lent:
    """Read the weights of every quantised layer out of its codes, in the model's type: a product has the bits that it has where
    they are read out anew each time. Layers whose activations are quantised too, and tables of which only rows are read, go on as
    they are. The weights are copies: a change of the codes shows in new products."""
    products: dict[QuantisedLinear, Product] = {}
    stacks: dict[QuantisedStack, list[Product]] = {}
    for part in _decoded(model):
        if isinstance(part, QuantisedStack):
            stacks[part] = [_product(layer) for layer in part.matrices]
        else:
            assert isinstance(part, QuantisedLinear)
            products[part] = _product(part)
    return Lent(products, stacks)


def decoded_bytes(model: Decoder) -> int:
    """Memory that the weights of `decoded_products` take."""
    return sum(prod(part.shape) for part in _decoded(model)) * model.dtype.itemsize


def _decoded(model: Decoder) -> list[QuantisedWeight]:
    """The parts whose weights are read out."""
    return [
        part
        for part in quantised_parts(model).values()
        if part.scheme.activation_bits != 8 and (part is model.head or not isinstance(part, QuantisedEmbedding))
    ]


def _product(layer: QuantisedLinear) -> Product:
    return partial(_multiply, layer.weight, layer.bias)


def _multiply(weight_NK: Tensor, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    bias = None if bias_N is None else bias_N.to(hidden.dtype)
    return functional.linear(hidden, weight_NK.to(hidden.dtype), bias)
