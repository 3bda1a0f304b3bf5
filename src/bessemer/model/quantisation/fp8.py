"""Weights of 8 bits in floating point, as DeepSeek-V3 and Qwen3's FP8 folders have them (DeepSeek-AI 2024, arXiv 2412.19437,
section 3.3): numbers of the type e4m3, and a scale for each block of 128 by 128.

Such folders ask that activations become e4m3 too, which a processor does not multiply. Here they stay as they are, so that
results are nearer to the weights' than those of a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.core.errors import ArtefactError
from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.base import Codes, NarrowFloatWeight, Scheme, TensorSpec
from bessemer.model.quantisation.config import GROUP_SIZES, QuantizeConfig
from bessemer.model.quantisation.storage_parts import ReadForm, StoredPart

# Shapes: N outputs, K inputs, G blocks of a row.

#: Value of `quant_method`.
FP8 = "fp8"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8(Scheme):
    """codes e4m3 (…, N, K); scales float32 (…, N, G), those of a block the same in its rows. block: inputs, and rows, of a
    block."""

    block: int = 128

    name = "fp8"
    rounds_activations = False
    is_recoverable = True

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        return cls(), None

    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        *rows, inputs = shape
        blocks = -(-inputs // self.block)
        return {"codes": TensorSpec(shape, torch.float8_e4m3fn), "scales": TensorSpec((*rows, blocks), torch.float32)}

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        *_, outputs, inputs = weight.shape
        padding = (0, -inputs % self.block, 0, -outputs % self.block)
        blocks = (
            functional.pad(weight.to(torch.float32), padding).unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block))
        )
        largest = blocks.abs().amax((-1, -3))
        scales = (largest.where(largest > 0, 1) / _LARGEST).repeat_interleave(self.block, dim=-2)[..., :outputs, :]
        codes = (weight.to(torch.float32) / self._spread(scales, inputs)).to(torch.float8_e4m3fn)
        return Codes(self, {"codes": codes, "scales": scales})

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["codes"]
        return codes.to(torch.float32) * self._spread(tensors["scales"], codes.shape[-1])

    def has_kernel(self, inputs: int) -> bool:
        return self.block in GROUP_SIZES

    def kernel_weight(self, tensors: Mapping[str, Tensor]) -> NarrowFloatWeight | None:
        codes = tensors["codes"]
        # the kernels know no NaN, of which all bits but the sign are set
        has_nan = bool(((codes.view(torch.uint8) & 127) == 127).any())
        return None if has_nan else NarrowFloatWeight(codes, tensors["scales"], self.block)

    def recoded(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        # neighbouring codes differ by a sixteenth or more, and rounding to bfloat16 moves a weight by a 512th at most
        scales = self._spread(tensors["scales"], weight.shape[-1])
        return (weight.to(torch.float32) / scales.where(scales != 0, 1)).to(torch.float8_e4m3fn)

    def _spread(self, scales: Tensor, inputs: int) -> Tensor:
        """A scale for each weight."""
        return scales.repeat_interleave(self.block, dim=-1)[..., :inputs]


def _check(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ArtefactError for variants that are not read."""
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or block[0] != block[1] or not isinstance(block[0], int) or block[0] < 1:
        raise ArtefactError(
            f"{path}: the weights are quantised in a way that is not supported: fp8 with weight_block_size {block!r}, and "
            "square blocks are read"
        )


def _is_left(settings: Mapping[str, Any], base: str) -> bool:
    """Whether a linear layer's matrix, by its name in the file without `.weight`, is not quantised."""
    return any(base == name or base.startswith(f"{name}.") for name in settings.get("modules_to_not_convert") or ())


def _parts(
    one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], settings: Mapping[str, Any]
) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a matrix of ours with this shape or rows of it.

    Raises ArtefactError for a matrix that is packed with others.
    """
    if not one.is_rows:
        raise ArtefactError(f"{one.name}: packed of several matrices, of which the form of {FP8} is not read here")
    assert isinstance(scheme, Fp8), scheme
    ours, view = scheme.tensors(*shape), one.views[0].view
    outputs, inputs = view(torch.empty(shape, device="meta")).shape
    in_blocks = (-(-outputs // scheme.block), -(-inputs // scheme.block))
    codes, scales = ((f"{module}.{name}", ours[name].shape) for name in ("codes", "scales"))
    yield StoredPart(one.name, *codes, (outputs, inputs), torch.float8_e4m3fn, view, whole, whole)
    every, spread = partial(_every_block, block=scheme.block), partial(_each_row, block=scheme.block, outputs=outputs)
    yield StoredPart(f"{one.name}_scale_inv", *scales, in_blocks, torch.float32, view, every, spread)


def _every_block(scales_NG: Tensor, block: int) -> Tensor:
    return scales_NG[::block].contiguous()


def _each_row(scales: Tensor, block: int, outputs: int) -> Tensor:
    return scales.float().repeat_interleave(block, dim=0)[:outputs]


def _scheme(settings: Mapping[str, Any]) -> Fp8:
    return Fp8(settings["weight_block_size"][0])


#: As DeepSeek and Qwen publish it.
FP8_FORM = ReadForm(_check, _scheme, _is_left, _parts)
