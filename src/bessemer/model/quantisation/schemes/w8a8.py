"""Weights of 8 bits that meet activations of 8 bits: each row of activations becomes int8 as it comes, and sums are exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from bessemer.model.device import widest_float
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.rounding import LARGEST_INT8
from bessemer.model.quantisation.schemes.base import Codes, Place, Scheme
from bessemer.model.quantisation.schemes.int8 import Int8
from bessemer.model.quantisation.schemes.integers import INTEGERS

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

    def compressed_format(self, place: Place) -> str | None:
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
    """Exact sums of products of int8 matrices, (M, N): whole numbers, in int32 or float64."""
    device = left_MK.device
    if device.type == "cpu":
        return torch._int_mm(left_MK, right_NK.T) if _int_mm_is_exact() else _sums_in_float32(left_MK, right_NK)
    # elsewhere `_int_mm` asks for certain sizes; in float64 every sum below 2^53 is exact too
    wide = widest_float(device)
    return left_MK.to(wide) @ right_NK.T.to(wide) if wide == torch.float64 else _sums_in_float32(left_MK, right_NK)


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
