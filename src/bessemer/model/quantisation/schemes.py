"""The quantisation schemes int8, int4 and w8a8.

int8: codes −127 … 127, a scale for each output or for each group of inputs. int4: codes 0 … 15, two a byte, a scale for each
group of inputs; the zero is 8, or a code of each group's own. Files of llama.cpp have a third kind, scale · code + offset,
whose zero is no code. w8a8: weights as int8; each row of activations becomes int8 when it is multiplied, and sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.quantisation.base import Codes, MatrixRole, Scheme, TensorSpec
from bessemer.model.quantisation.config import GROUP_SIZES, QuantizeConfig
from bessemer.model.quantisation.integers import (
    BLOCK,
    INTEGERS,
    LARGEST_INT8,
    MIDDLE,
    NAIVE,
    PACKED,
    IntegerScheme,
    Packing,
    block_column,
    bytes_of_words,
    int8_of_words,
    largest_group,
    unpack,
    words_of_bytes,
    words_of_int8,
)


@dataclass(frozen=True)
class Int8(IntegerScheme):
    """Codes int8, symmetric."""

    name = "int8"
    bits = 8

    def __post_init__(self) -> None:
        assert self.zero == "fixed", "codes of 8 bits are symmetric"

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        wanted_size = None if is_end else config.group_size
        if wanted_size is None:
            return cls(), None
        size = largest_group(inputs, wanted_size)
        if size == wanted_size:
            return cls(size), None
        given = f"groups of {size}" if size else "8 bits, a scale for each output"
        return cls(size), f"which {wanted_size} does not divide: {given}"

    def code_spec(self, *shape: int) -> TensorSpec:
        return TensorSpec(shape, torch.int8)

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors["scales"]
        grouped = tensors["codes"].to(torch.float32).unflatten(-1, (scales.shape[-1], -1))
        return (grouped * scales[..., None]).flatten(-2)

    def compressed_format(self, role: MatrixRole) -> str | None:
        # a tied head shares the tensor `weight` with the embedding, and no other
        return PACKED if role == "block" else NAIVE

    def packing(self, inputs: int) -> Packing:
        return words_of_int8, partial(int8_of_words, inputs=inputs)

    def gguf_type(self, inputs: int) -> str | None:
        return "Q8_0" if self.in_blocks(inputs) else None

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return cls(BLOCK) if kind == "Q8_0" else None

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        super().write_blocks(tensors, blocks)
        blocks["q"] = tensors["codes"].reshape(-1, BLOCK).numpy()

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        return {"codes": torch.from_numpy(blocks["q"].reshape(-1)), "scales": block_column(blocks, "d")}


@dataclass(frozen=True)
class Int4(IntegerScheme):
    """Codes uint8, of two weights each, the even one low."""

    name = "int4"
    bits = 4

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        wanted_size = config.group_size if config.scheme == cls.name and config.group_size else GROUP_SIZES[0]
        size = largest_group(inputs, wanted_size)
        if size is None:
            return Int8(), f"which {wanted_size} does not divide: 8 bits, a scale for each output"
        note = None if size == wanted_size else f"which {wanted_size} does not divide: groups of {size}"
        return cls(size, "fixed" if config.symmetric else "code"), note

    def code_spec(self, *shape: int) -> TensorSpec:
        return TensorSpec((*shape[:-1], shape[-1] // 2), torch.uint8)

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors["scales"]
        grouped = unpack(tensors["codes"]).to(torch.float32).unflatten(-1, (scales.shape[-1], -1))
        if self.zero == "offset":
            return (grouped * scales[..., None] + tensors["offsets"][..., None]).flatten(-2)
        zeros = tensors["zeros"][..., None].to(torch.float32) if self.zero == "code" else MIDDLE
        return ((grouped - zeros) * scales[..., None]).flatten(-2)

    def compressed_format(self, role: MatrixRole) -> str | None:
        return None if role == "embedding" or self.zero == "offset" else PACKED

    def packing(self, inputs: int) -> Packing:
        return words_of_bytes, bytes_of_words

    def gguf_type(self, inputs: int) -> str | None:
        if not self.in_blocks(inputs):
            return None
        return "Q4_0" if self.zero == "fixed" else "Q4_1"

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return {"Q4_0": cls(BLOCK), "Q4_1": cls(BLOCK, "offset")}.get(kind)

    # a block of GGUF has codes 0 … 15 in the low halves of its bytes and 16 … 31 in the high ones; ours pair neighbours

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        super().write_blocks(tensors, blocks)
        wide = unpack(tensors["codes"]).reshape(-1, BLOCK)
        blocks["q"] = (wide[:, : BLOCK // 2] | (wide[:, BLOCK // 2 :] << 4)).numpy()
        if self.zero == "offset":
            blocks["m"] = self.in_each_block(tensors, tensors["offsets"])
        elif self.zero == "code":
            blocks["m"] = self.in_each_block(tensors, -tensors["scales"] * tensors["zeros"].to(torch.float32))

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        # two bytes at a time, which hold the codes i and i + 1, and i + 16 and i + 17 above them
        pairs = blocks["q"].copy().view("<u2")
        low, high = (pairs & 0x000F) | (pairs >> 4 & 0x00F0), (pairs >> 4 & 0x000F) | (pairs >> 8 & 0x00F0)
        codes = torch.from_numpy(np.concatenate((low, high), axis=1).astype(np.uint8).reshape(-1))
        tensors = {"codes": codes, "scales": block_column(blocks, "d")}
        return tensors | ({"offsets": block_column(blocks, "m")} if self.zero == "offset" else {})


# Shapes: N outputs, K inputs, M rows of activations.

_HALF_RANGE_INT8 = 127.5
#: Products of two int8 numbers whose sum float32 holds exactly, whatever the order: each is at most 2^14, the sum 2^24.
_EXACT_IN_FLOAT32 = 1024


@dataclass(frozen=True)
class W8A8(Int8):
    """Codes int8, a scale for each output."""

    name = "w8a8"
    is_weight_only = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.group_size is None, "a row of int8 has one scale"

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        return cls(), None

    def product(self, hidden: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
        return int8_product(hidden, weight, bias)

    def widened(self, stored: Codes) -> Codes | None:
        codes = stored.tensors["codes"]
        if codes.device.type != "cpu" or _int_mm_is_exact():
            return None
        return Codes(self, {**stored.tensors, "codes": codes.to(torch.float32)})

    def compressed_format(self, role: MatrixRole) -> str | None:
        return INTEGERS

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return None


def quantise_rows(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (…, K) as int8 and the float32 scale of each row, (…, 1): the largest of a row becomes ±127.5."""
    wide = hidden.to(torch.float32)
    scales = wide.abs().amax(-1, keepdim=True) / _HALF_RANGE_INT8
    codes = (wide / scales.where(scales > 0, 1)).round().clamp(-LARGEST_INT8 - 1, LARGEST_INT8)
    return codes.to(torch.int8), scales


def int8_product(hidden: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
    """A linear layer whose two sides are int8, one scale a row: sums are exact integers, scaled at the end."""
    codes, scales = quantise_rows(hidden)
    sums = integer_product(codes.flatten(0, -2), weight.tensors["codes"]).view(*hidden.shape[:-1], -1)
    product = sums.to(torch.float32) * scales * weight.tensors["scales"][:, 0]
    return (product if bias is None else product + bias).to(hidden.dtype)


def integer_product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """Exact sums of products of int8 matrices, int32 (M, N). The right one may be in float32."""
    device = left_MK.device
    if device.type == "cpu":
        is_widened = right_NK.dtype == torch.float32 or not _int_mm_is_exact()
        return _sums_in_float32(left_MK, right_NK) if is_widened else torch._int_mm(left_MK, right_NK.T)
    return padded_int_mm(left_MK, right_NK) if device.type == "cuda" else _sums_in_float32(left_MK, right_NK)


#: Rows of the left matrix, and what inputs and outputs are multiples of, as `_int_mm` asks for them on a GPU.
_LEAST_ROWS, _MULTIPLE = 32, 8


def padded_int_mm(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """PyTorch's product of int8 matrices on a GPU, int32 (M, N), of any sizes: zeros fill them up."""
    rows, (outputs, inputs) = len(left_MK), right_NK.shape
    more_rows, more_inputs, more_outputs = max(0, _LEAST_ROWS - rows), -inputs % _MULTIPLE, -outputs % _MULTIPLE
    if more_rows or more_inputs:
        left_MK = functional.pad(left_MK, (0, more_inputs, 0, more_rows))
    if more_inputs or more_outputs:
        right_NK = functional.pad(right_NK, (0, more_inputs, 0, more_outputs))
    return torch._int_mm(left_MK, right_NK.T)[:rows, :outputs]


def _sums_in_float32(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """`integer_product` by products in float32 of as many inputs as it sums exactly."""
    sums_MN = torch.zeros(len(left_MK), len(right_NK), dtype=torch.int32, device=left_MK.device)
    for left, right in zip(left_MK.split(_EXACT_IN_FLOAT32, 1), right_NK.split(_EXACT_IN_FLOAT32, 1), strict=True):
        sums_MN += (left.to(torch.float32) @ right.T.to(torch.float32)).to(torch.int32)
    return sums_MN


@cache
def _int_mm_is_exact() -> bool:
    """Whether PyTorch's product of int8 matrices is exact on this processor. With AVX2 and no VNNI it adds two products at a
    time in 16 bits, which do not hold them."""
    for rows in (1, 2, 32):
        left_MK, right_NK = (torch.full((count, 64), LARGEST_INT8, dtype=torch.int8) for count in (rows, 32))
        if not bool((torch._int_mm(left_MK, right_NK.T) == 64 * LARGEST_INT8**2).all()):
            return False
    return True
