"""Packed matmuls of a model's quantised layers by the compiled kernels, and whether they are faster than PyTorch's.

They work for any model that its own modules compute (docs/kernels.md).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from math import prod
from statistics import median

import torch
from torch import Tensor

from bessemer.core.metrics import size
from bessemer.model.cpu_kernels import arithmetic
from bessemer.model.cpu_kernels.packed import PackedMatrix, decoded_type, refusal
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_decoder import product, read_weights
from bessemer.model.quantisation.quantised_layers import (
    PackedMatmuls,
    Product,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedStack,
    QuantisedWeight,
    quantised_parts,
    restore_codes,
)
from bessemer.model.quantisation.schemes import Int8


def packed_products(model: Decoder, threads: int, *, activation_bits: int = 8, release: bool = False) -> PackedMatmuls:
    """Pack every quantised layer, each matrix of the experts by itself. Codes that the kernels do not know are decoded first.

    Weights that attention reads themselves are dequantised once, and not packed.
    The codes are copied: a change of the model's shows in new products. activation_bits: as in `PackedMatrix.multiply`.
    release: packed codes are the only ones from then on.
    """
    restore_codes(model)
    products: dict[QuantisedLinear, Product] = {}
    stacks: dict[QuantisedStack, list[Product]] = {}
    weights = read_weights(model)
    for part in model.modules():
        if isinstance(part, QuantisedLinear) and part not in weights and not _is_table(part, model):
            packed = _packed(part, threads, activation_bits)
            if packed is not None:
                matrix, products[part] = packed
                if release:
                    matrix.take_codes(part)
        if isinstance(part, QuantisedStack):
            of_each = [packed for layer in part.matrices if (packed := _packed(layer, threads, activation_bits)) is not None]
            if len(of_each) == len(part.matrices):
                stacks[part] = [product for _, product in of_each]
                if release and (names := of_each[0][0].replaced_tensors(part.matrices[0])):
                    keepers = [matrix.keeper(layer) for (matrix, _), layer in zip(of_each, part.matrices, strict=True)]
                    part.release_matrices(keepers, names)
    return PackedMatmuls(products, stacks, weights)


def bytes_for_kernels(model: Decoder) -> dict[str, int]:
    """Bytes of the weights that are decoded for the kernels, which do not know their codes, by the name of the scheme."""
    found: Counter[str] = Counter()
    for part in _multiplied(model):
        if part.scheme.is_weight_only and not part.scheme.has_kernel(part.shape[-1]):
            found[part.scheme.name] += prod(part.shape) * decoded_type(part.dtype).itemsize
    return dict(found)


def describe_codes(model: Decoder, activation_bits: int = 8) -> list[str]:
    """How the kernels keep and meet a quantised model's weights, in words; empty for other models."""
    kind, decoded = str(decoded_type(model.dtype)).removeprefix("torch."), bytes_for_kernels(model)
    words = [f"codes of {name} read out once ({kind}, {size(taken)})" for name, taken in decoded.items()]
    if any(part.scheme.rounds_activations and part.scheme.has_kernel(part.shape[-1]) for part in _multiplied(model)):
        words.append(f"activations of {activation_bits} bits")
    return words


def _multiplied(model: Decoder) -> list[QuantisedWeight]:
    """The quantised weights of a model that are not only looked up."""
    parts = quantised_parts(model).values()
    return [part for part in parts if not isinstance(part, QuantisedLinear) or not _is_table(part, model)]


def _is_table(layer: QuantisedLinear, model: Decoder) -> bool:
    """Whether a layer is only looked up: an embedding that is not tied to the head."""
    return isinstance(layer, QuantisedEmbedding) and layer is not model.head


def packed_product(layer: QuantisedLinear, threads: int, activation_bits: int = 8) -> Product | None:
    """The product of one layer by packed codes, with activations of 8 or 16 bits, or by decoded ones; None where activations
    are quantised by a scheme that the kernels do not know."""
    packed = _packed(layer, threads, activation_bits)
    return None if packed is None else packed[1]


def _packed(layer: QuantisedLinear, threads: int, activation_bits: int) -> tuple[PackedMatrix, Product] | None:
    """A layer's weight, packed, and its product; None as of `packed_product`."""
    if refusal(layer) is not None:
        return None
    packed = PackedMatrix.of(layer)
    return packed, partial(packed.multiply, threads=threads, activation_bits=activation_bits)


#: Outputs and inputs of the matrix that is timed: too large for a cache.
_SIZE = 4096
_TRIALS = 5


@cache
def faster_dtype() -> torch.dtype | None:
    """The type of weights, float16 or float32, by which PyTorch multiplies a row sooner than the kernels do by codes of 8 bits;
    None where the kernels are faster.

    Measured once in a process, and only where the kernels are plain C++ or none: with instructions for products of bytes they
    are faster, and take less memory.
    """
    kind = arithmetic()
    if kind not in ("portable", "modules"):
        return None
    row_1K = torch.ones(1, _SIZE)
    seconds = {dtype: _seconds(partial(product, torch.zeros(_SIZE, _SIZE, dtype=dtype), None, row_1K)) for dtype in _DTYPES}
    best = min(_DTYPES, key=lambda dtype: seconds[dtype])
    if kind == "modules":
        return best
    matrix = PackedMatrix.of(QuantisedLinear(_SIZE, _SIZE, Int8(32)))
    return best if seconds[best] < _seconds(partial(matrix.multiply, row_1K)) else None


_DTYPES = (torch.float16, torch.float32)


def _seconds(compute: Callable[[], Tensor]) -> float:
    trials = []
    for _ in range(_TRIALS + 1):
        start = time.perf_counter()
        compute()
        trials.append(time.perf_counter() - start)
    return median(trials[1:])
