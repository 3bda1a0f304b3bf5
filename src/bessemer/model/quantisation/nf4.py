"""The quantisation scheme nf4: 4-bit NormalFloat, with scales of 8 bits (Dettmers et al. 2023, QLoRA, arXiv 2305.14314).

A code is one of 16 numbers in −1 … 1, the quantiles of a normal distribution, of which one is 0: weights that are normal then
use all codes alike. 64 neighbours of a row share a scale, their largest magnitude. Scales are codes too: less their mean, 256
of them share a float32 number, and each is the nearest of 256 numbers of the dynamic map (Dettmers et al. 2022, arXiv
2110.02861, section 1.3). A weight then takes 4 + 8/64 + 32/(64 · 256) = 4.127 bits; with float32 scales 4.5.

The tensors are those of the package `bitsandbytes`, whose form in files `storage` reads and writes: the first of two codes lies
in the high half of a byte, and blocks of scales run on over the rows. No text is read and nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.quantisation.base import Codes, Scheme, TensorSpec
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.schemes import Int8

#: Weights of a block, and scales of a block of scales.
BLOCK, SCALE_BLOCK = 64, 256
#: The 16 numbers (appendix E).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: Powers of ten of the dynamic map.
_EXPONENTS = 7

# Shapes: N outputs, K inputs, G blocks of a row, M blocks of scales; … a stack of matrices.


@cache
def _levels() -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32)


@cache
def dynamic_map() -> Tensor:
    """The 256 numbers of a scale's code, ascending: of each power of ten from 10⁻⁶ to 1 the means of twice as many equal parts
    of 0.1 … 1 as of the one before, with both signs; 0 and 1."""
    numbers = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - _EXPONENTS + 1)
        numbers += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@cache
def _pairs() -> Tensor:
    """The two numbers of every byte of codes, (256, 2)."""
    bytes_of_codes = torch.arange(256)
    return torch.stack((_levels()[bytes_of_codes >> 4], _levels()[bytes_of_codes & 15]), dim=1)


def _nearest(values: Tensor, ascending: Tensor) -> Tensor:
    """The index of the nearest of ascending numbers, as uint8."""
    ascending = ascending.to(values.device)
    return torch.bucketize(values, (ascending[1:] + ascending[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class NF4(Scheme):
    """codes (…, N, K / 2); scales (…, N, G) as codes, with their own scales (…, M) and the mean (…, 1) that was taken off.

    double: whether scales are codes; else they are float32, and alone.
    """

    double: bool = True

    name = "nf4"
    is_recoverable = True

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        if inputs % BLOCK:
            return Int8(), f"which {BLOCK} does not divide: 8 bits, a scale for each output"
        return cls(), None

    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        *stack, outputs, inputs = shape
        blocks = inputs // BLOCK
        codes = TensorSpec((*stack, outputs, inputs // 2), torch.uint8)
        if not self.double:
            return {"codes": codes, "scales": TensorSpec((*stack, outputs, blocks), torch.float32)}
        return {
            "codes": codes,
            "scales": TensorSpec((*stack, outputs, blocks), torch.uint8),
            "scales_of_scales": TensorSpec((*stack, -(-outputs * blocks // SCALE_BLOCK)), torch.float32),
            "mean_scale": TensorSpec((*stack, 1), torch.float32),
        }

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        if weight.ndim > 2:
            return Codes.stack([self.quantise(matrix_NK) for matrix_NK in weight])
        blocks_NGB = weight.to(torch.float32).unflatten(-1, (-1, BLOCK))
        scales_NG = blocks_NGB.abs().amax(-1)
        tensors = {"codes": _nearest_codes(blocks_NGB, scales_NG), "scales": scales_NG}
        return Codes(self, tensors | (_coded(scales_NG) if self.double else {}))

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales = tensors["codes"], self._scales(tensors)
        # a table of pairs: half as many look-ups, by indices of 4 bytes
        wide = functional.embedding(codes.flatten().to(torch.int32), _pairs().to(codes.device))
        return wide.view(*scales.shape, BLOCK).mul_(scales[..., None]).flatten(-2)

    def recoded(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        # levels lie 0.08 of a block's scale apart or more, and rounding to bfloat16 moves a weight by a 512th at most
        return _nearest_codes(weight.to(torch.float32).unflatten(-1, (-1, BLOCK)), self._scales(tensors))

    def _scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of every block, (…, N, G) float32."""
        scales = tensors["scales"]
        return _decoded(scales, tensors["scales_of_scales"], tensors["mean_scale"]) if self.double else scales


def _nearest_codes(blocks_NGB: Tensor, scales_NG: Tensor) -> Tensor:
    """The code of the level that is nearest to each weight, two to a byte."""
    relative_NGB = blocks_NGB / scales_NG.where(scales_NG != 0, 1)[..., None]
    wide_NK = _nearest(relative_NGB, _levels()).flatten(-2)
    return wide_NK[..., 0::2] << 4 | wide_NK[..., 1::2]


def _coded(scales_NG: Tensor) -> dict[str, Tensor]:
    """Scales as codes of the dynamic map."""
    mean = scales_NG.mean()
    flat = (scales_NG - mean).flatten()
    padded_MB = functional.pad(flat, (0, -len(flat) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest_M = padded_MB.abs().amax(-1)
    relative_MB = padded_MB / largest_M.where(largest_M > 0, 1)[:, None]
    codes = _nearest(relative_MB, dynamic_map()).flatten()[: len(flat)].view_as(scales_NG)
    return {"scales": codes, "scales_of_scales": largest_M, "mean_scale": mean.view(1)}


def _decoded(codes: Tensor, scales_of_scales: Tensor, mean_scale: Tensor) -> Tensor:
    """The scales that codes stand for, (…, N, G) float32."""
    stack, each = codes.shape[:-2], prod(codes.shape[-2:])
    numbers = dynamic_map().to(codes.device)[codes.reshape(*stack, each).to(torch.int32)]
    spread = scales_of_scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., :each]
    return (numbers * spread + mean_scale).view(codes.shape)
