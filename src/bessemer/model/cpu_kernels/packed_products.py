"""Packed matmuls of a model's quantised layers, for any model that its own modules compute (docs/kernels.md)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from bessemer.model.cpu_kernels.packed import PackedMatrix, kernel_weight, refusal
from bessemer.model.decoder import Decoder
from bessemer.model.latent_attention import LatentAttention
from bessemer.model.quantised_experts import QuantisedStack
from bessemer.model.quantised_linear import PackedMatmuls, Product, QuantisedEmbedding, QuantisedLinear, restore_codes


def packed_products(model: Decoder, threads: int, *, release: bool = False) -> PackedMatmuls:
    """Pack every quantised layer that the kernels know, each matrix of the experts by itself; the others go on as they are.

    Latent attention needs the weights of one of its matrices and not its product: they are read out of their codes once.
    The codes are copied: a change of the model's shows in new products. release: packed codes are the only ones from then on.
    """
    restore_codes(model)
    products: dict[QuantisedLinear, Product] = {}
    stacks: dict[QuantisedStack, list[Product]] = {}
    weights: dict[QuantisedLinear, Tensor] = {}
    for part in model.modules():
        if isinstance(part, LatentAttention) and isinstance(part.kv_b_proj, QuantisedLinear):
            weights[part.kv_b_proj] = part.kv_b_proj.weight
        if isinstance(part, QuantisedLinear) and part not in weights and not _is_table(part, model):
            packed = _packed(part, threads)
            if packed is not None:
                matrix, products[part] = packed
                if release:
                    part.release(matrix.keeper(part))
        if isinstance(part, QuantisedStack):
            of_each = [packed for layer in part.matrices if (packed := _packed(layer, threads)) is not None]
            if len(of_each) == len(part.matrices):
                stacks[part] = [product for _, product in of_each]
                if release:
                    keepers = [matrix.keeper(layer) for (matrix, _), layer in zip(of_each, part.matrices, strict=True)]
                    part.release_matrices(keepers)
    return PackedMatmuls(products, stacks, weights)


def _is_table(layer: QuantisedLinear, model: Decoder) -> bool:
    """Whether rows are read out of a layer and nothing is multiplied by it: an embedding that is not the head's matrix too."""
    return isinstance(layer, QuantisedEmbedding) and layer is not model.head


def packed_product(layer: QuantisedLinear, threads: int) -> Product | None:
    """The product of one layer by packed codes, with activations of 8 bits; None where the kernels do not know its groups."""
    found = _packed(layer, threads)
    return None if found is None else found[1]


def _packed(layer: QuantisedLinear, threads: int) -> tuple[PackedMatrix, Product] | None:
    """The packed codes of a layer and its product; None where the kernels do not know them."""
    weight = kernel_weight(layer)
    if weight is None or refusal(weight) is not None:
        return None
    packed = PackedMatrix.of(weight)
    return packed, partial(packed.multiply, threads=threads)
