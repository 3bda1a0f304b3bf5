"""Weights in floating point of 4 bits (e2m1) in Hugging Face folders: MXFP4, as gpt-oss and compressed-tensors have it, and
NVFP4.

Both hold the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, two neighbours a byte, the first in the low half. In MXFP4
32 neighbours share a power of two (OCP Microscaling 1.0); such a weight is kept as the blocks of GGUF's type of the same name,
which the kernels multiply. In NVFP4 16 neighbours share a scale in e4m3, and all scales of a matrix a float32 number that
divides them: weight = number · (scale / divisor). That is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.base import Codes, CompressedForm, FileTensor, MatrixRole, Scheme, TensorSpec
from bessemer.model.quantisation.blocks import (
    MXFP4_BLOCK,
    GgufBlocks,
    float_settings,
    halves_of_neighbours,
    is_float_of_four_bits,
    mxfp4_codes,
    mxfp4_exponents,
)
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.integers import pack, unpack
from bessemer.model.quantisation.storage_parts import ReadForm, StoredPart

# Shapes: E experts, N outputs, K inputs, G blocks of a row, P bytes of a row.

#: Value of `quant_method` of gpt-oss.
MXFP4 = "mxfp4"
#: The numbers of the codes; the upper eight are the negatives of the lower.
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_BLOCK = 16
_LARGEST, _LARGEST_SCALE = _NUMBERS[-1], torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Nvfp4(Scheme):
    """codes (…, N, K / 2); scales e4m3 (…, N, G); divisors float32 (…, N, 1), the same in all rows of a matrix."""

    name = "nvfp4"

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        return cls(), None

    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        *rows, inputs = shape
        assert inputs % _NVFP4_BLOCK == 0, shape
        return {
            "codes": TensorSpec((*rows, inputs // 2), torch.uint8),
            "scales": TensorSpec((*rows, inputs // _NVFP4_BLOCK), torch.float8_e4m3fn),
            "divisors": TensorSpec((*rows, 1), torch.float32),
        }

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        blocks = weight.to(torch.float32).unflatten(-1, (-1, _NVFP4_BLOCK))
        largest = blocks.abs().amax(-1)
        most = largest.amax((-1, -2), keepdim=True)
        divisors = _LARGEST * _LARGEST_SCALE / most.where(most > 0, _LARGEST * _LARGEST_SCALE)
        scales = (largest / _LARGEST * divisors).to(torch.float8_e4m3fn)
        steps = (scales.to(torch.float32) / divisors)[..., None]
        numbers = torch.tensor(_NUMBERS, device=weight.device)
        codes = torch.bucketize((blocks / steps.where(steps > 0, 1)).abs(), (numbers[1:] + numbers[:-1]) / 2)
        signed = codes.to(torch.uint8) | (blocks < 0).to(torch.uint8) << 3
        divisors = divisors.expand(*weight.shape[:-1], 1).contiguous()
        return Codes(self, {"codes": pack(signed.flatten(-2)), "scales": scales, "divisors": divisors})

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales = tensors["codes"], tensors["scales"].to(torch.float32) / tensors["divisors"]
        numbers = torch.tensor((*_NUMBERS, *(-number for number in _NUMBERS)), device=codes.device)
        values = numbers[unpack(codes).to(torch.int32)].unflatten(-1, (-1, _NVFP4_BLOCK))
        return (values * scales[..., None]).flatten(-2)

    def compressed(self, role: MatrixRole) -> CompressedForm | None:
        if role != "block":
            return None
        weights = float_settings("tensor_group", _NVFP4_BLOCK)

        def tensors(outputs: int, inputs: int) -> list[FileTensor]:
            scales = TensorSpec((outputs, inputs // _NVFP4_BLOCK), torch.float8_e4m3fn)
            one = TensorSpec((1,), torch.float32)
            return [
                FileTensor("weight_packed", "codes", TensorSpec((outputs, inputs // 2), torch.uint8), whole, whole),
                FileTensor("weight_scale", "scales", scales, whole, whole),
                FileTensor("weight_global_scale", "divisors", one, _first_row, partial(_in_all_rows, outputs=outputs)),
            ]

        return CompressedForm("nvfp4-pack-quantized", weights, None, tensors)

    @classmethod
    def of_compressed(cls, weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None) -> Self | None:
        return cls() if is_float_of_four_bits(weights, _NVFP4_BLOCK) else None


def _first_row(divisors_N1: Tensor) -> Tensor:
    return divisors_N1[0].clone()


def _in_all_rows(divisor: Tensor, outputs: int) -> Tensor:
    return divisor.to(torch.float32).expand(outputs, 1).contiguous()


# --- gpt-oss ---


def _check(settings: Mapping[str, Any], path: Path) -> None:
    """There is one variant."""


def _scheme(settings: Mapping[str, Any]) -> GgufBlocks:
    return GgufBlocks("MXFP4")


def _is_left(settings: Mapping[str, Any], base: str) -> bool:
    """Only experts are quantised."""
    return ".experts." not in base


def _parts(
    one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], settings: Mapping[str, Any]
) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, the matrices of all experts: blocks (E, N, G, 16) and scales (E, N, G), output
    by input, where `gate_up_proj` has rows of gate and up in turn. Raises ArtefactError for anything else."""
    place = one.name.rpartition(".")[2]
    if len(shape) != 3 or place not in ("gate_up_proj", "down_proj"):
        raise ArtefactError(f"{one.name}: quantised as {MXFP4}, which is read of gpt-oss's experts alone")
    experts, outputs, inputs = shape
    if inputs % MXFP4_BLOCK:
        raise ArtefactError(f"{one.name}: {inputs} inputs, of which blocks of {MXFP4_BLOCK} hold no rest")
    codes, groups = scheme.tensors(*shape)["codes"], inputs // MXFP4_BLOCK
    rows = _in_turn if place == "gate_up_proj" else whole

    def part(
        suffix: str, lengths: tuple[int, ...], within: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor]
    ) -> StoredPart:
        def view(tensor: Tensor) -> Tensor:
            return within(rows(tensor))

        def unpack(tensor: Tensor) -> Tensor:
            return rows_of_file(read(tensor), outputs) if rows is _in_turn else read(tensor)

        return StoredPart(
            f"{one.name}_{suffix}", f"{module}.codes", codes.shape, lengths, torch.uint8, view, _not_written, unpack
        )

    yield part("blocks", (experts, outputs, groups, MXFP4_BLOCK // 2), mxfp4_codes, halves_of_neighbours)
    yield part("scales", (experts, outputs, groups), mxfp4_exponents, whole)


def _in_turn(tensor_ENP: Tensor) -> Tensor:
    """Rows of gate, then of up, as pairs of both: (E, N / 2, 2, P)."""
    return tensor_ENP.unflatten(1, (2, -1)).transpose(1, 2)


def rows_of_file(tensor: Tensor, outputs: int) -> Tensor:
    """Rows in turn, (E, N, …), as pairs."""
    return tensor.unflatten(1, (outputs // 2, 2))


def _not_written(tensor: Tensor) -> Tensor:
    raise AssertionError("folders are written in the form of compressed-tensors, or in our own")


#: As gpt-oss is published.
MXFP4_FORM = ReadForm(_check, _scheme, _is_left, _parts)
