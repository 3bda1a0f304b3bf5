"""Codes in the files of a Hugging Face folder, in the form that the package `compressed-tensors` gave them.

A matrix `NAME.weight` is there as `NAME.weight_packed` (int32, several codes each, `pack-quantized`) or as `NAME.weight` (int8,
`int-quantized` where activations are quantised too, else `naive-quantized`), with `NAME.weight_scale` (float16, a column a
group) and, where zeros are codes of their own, `NAME.weight_zero_point` (int32, packed along the outputs).

What that form has no place for is kept under our own names, and the folder's `quant_method` is then `bessemer`, which other
readers refuse: GPT-2's and gpt-oss's matrices, which lie there input by output; offsets that are no code; an embedding of 4
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD
from bessemer.model.quantised_linear import Scheme

# Shapes: N outputs, K inputs, G groups of a row, P bytes of a row.

PACKED, INTEGERS, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"


@dataclass(frozen=True)
class StoredPart:
    """One tensor of a file that holds codes, scales or zeros.

    ours: the tensor of ours that it is made of, of `ours_shape`, seen through `view`. pack and unpack: between that view and
    the file's form; unpack is None for what is there for other readers alone and says nothing new.
    """

    name: str
    ours: str
    ours_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor] | None

    def packed(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the file holds it."""
        return self.pack(self.view(ours[self.ours]))


def form_of(module: str, scheme: Scheme) -> str:
    """The name of the form in which compressed-tensors keeps a weight."""
    if scheme.activation_bits == 8:
        return INTEGERS
    # a tied head shares the tensor `weight` with the embedding, and no other
    return NAIVE if module in (EMBEDDING, HEAD) and scheme.bits == 8 else PACKED


def fits_compressed_tensors(stored: Sequence[Stored], schemes: Mapping[str, Scheme], weights: Collection[str]) -> bool:
    """Whether compressed-tensors has a form for every weight. weights: names of the tensors that are quantised."""
    if any(scheme.zero == "offset" for scheme in schemes.values()) or schemes.get(EMBEDDING, Scheme()).bits == 4:
        return False
    return all(one.is_rows for one in stored if any(place.name in weights for place in one.places))


def compressed_parts(one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], tied: bool) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a weight of ours with this shape or rows of it."""
    base, view = one.name.removesuffix(".weight"), one.places[0].view
    matrix = view(torch.empty(shape, device="meta"))
    outputs, inputs = matrix.shape
    groups = scheme.scale_shape(outputs, inputs)[-1]
    kind = form_of(module, scheme)
    codes = (f"{module}.codes", scheme.code_shape(*shape))
    scales, zeros = ((f"{module}.{part}", scheme.scale_shape(*shape)) for part in ("scales", "zeros"))
    if kind != PACKED:
        yield StoredPart(f"{base}.weight", *codes, (outputs, inputs), torch.int8, view, whole, whole)
    else:
        width = -(-inputs * scheme.bits // 32)
        packing = (_pack_8, lambda words: _unpack_8(words, inputs)) if scheme.bits == 8 else (_words, _bytes)
        yield StoredPart(f"{base}.weight_packed", *codes, (outputs, width), torch.int32, view, *packing)
        yield StoredPart(
            f"{base}.weight_shape", *codes, (2,), torch.int64, view, lambda _: torch.tensor([outputs, inputs]), None
        )
    half, wide = (lambda tensor: tensor.to(torch.float16)), (lambda tensor: tensor.to(torch.float32))
    yield StoredPart(f"{base}.weight_scale", *scales, (outputs, groups), torch.float16, view, half, wide)
    # a reader that ties the codes gives the head scales of its own
    if module == EMBEDDING and tied:
        yield StoredPart(f"{HEAD}.weight_scale", *scales, (outputs, groups), torch.float16, view, half, None)
    if scheme.zero == "code":
        width = -(-outputs // 8)
        yield StoredPart(
            f"{base}.weight_zero_point",
            *zeros,
            (width, groups),
            torch.int32,
            view,
            _pack_zeros,
            lambda words: _unpack_zeros(words, outputs),
        )


def own_parts(module: str, scheme: Scheme, shape: tuple[int, ...]) -> Iterator[StoredPart]:
    """A weight's codes, scales and what else it has, under our own names and as they are."""
    kind = torch.uint8 if scheme.bits == 4 else torch.int8
    code_shape, scale_shape = scheme.code_shape(*shape), scheme.scale_shape(*shape)
    yield StoredPart(f"{module}.codes", f"{module}.codes", code_shape, code_shape, kind, whole, whole, whole)
    parts = {"scales": torch.float32}
    parts |= {"code": {"zeros": torch.uint8}, "offset": {"offsets": torch.float32}}.get(scheme.zero, {})
    for name, dtype in parts.items():
        yield StoredPart(f"{module}.{name}", f"{module}.{name}", scale_shape, scale_shape, dtype, whole, whole, whole)


def _words(packed_NP: Tensor) -> Tensor:
    """Bytes of two codes as int32; the first code is in the lowest bits of both."""
    # by way of one dimension: a dimension of one element may have any stride, and a view as int32 asks for some
    return packed_NP.reshape(-1).view(torch.int32).view(packed_NP.shape[0], -1)


def _bytes(words: Tensor) -> Tensor:
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def _pack_8(codes_NK: Tensor) -> Tensor:
    """int8 as int32, four each, counted from −128 and filled with zeros."""
    shifted = codes_NK.contiguous().view(torch.uint8) ^ 128
    return _words(functional.pad(shifted, (0, -shifted.shape[-1] % 4)))


def _unpack_8(words: Tensor, inputs: int) -> Tensor:
    return (_bytes(words)[:, :inputs] ^ 128).contiguous().view(torch.int8)


def _pack_zeros(zeros_NG: Tensor) -> Tensor:
    """Zeros 0 … 15 as int32, eight rows each."""
    rows_GN = functional.pad(zeros_NG.T, (0, -zeros_NG.shape[0] % 8))
    return _words(rows_GN[:, 0::2] | (rows_GN[:, 1::2] << 4)).T.contiguous()


def _unpack_zeros(words: Tensor, outputs: int) -> Tensor:
    packed_GP = _bytes(words.T)
    return torch.stack((packed_GP & 15, packed_GP >> 4), dim=-1).flatten(-2)[:, :outputs].T.contiguous()
