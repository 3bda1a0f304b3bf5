"""Weights as the blocks of a GGUF file: of the K types, of Q5_0, Q5_1, IQ4_NL, IQ4_XS and MXFP4, as they lie in the file.

A block of a K type holds 256 neighbours of a row. Each 32 of them have a scale and a minimum, codes of 6 bits that one pair of
float16 numbers turns into numbers: weight = (d · scale) · q − (m · minimum). In Q6_K each 16 have a scale, of 8 bits, and no
minimum: weight = (d · scale) · (q − 32). Q5_0 and Q5_1 are blocks of 32: d · (q − 16), and d · q + m. In IQ4_NL a code is
a place in a table of 16 whole numbers, and in IQ4_XS each 32 of 256 neighbours have a scale of 6 bits more. MXFP4 has floats of
4 bits and a power of two for each 32 (OCP Microscaling 1.0). Layouts are those of llama.cpp's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.model.families.layout import whole
from bessemer.model.quantisation.base import BlockWeight, Codes, CompressedForm, FileTensor, MatrixRole, Scheme, TensorSpec
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.integers import pack, unpack

# Shapes: N outputs, K inputs, B blocks, V values of a block; … a stack of matrices, or none.


class BlockForm(NamedTuple):
    """A number type. values and bytes of a block; bits of a code; number: llama.cpp's. decode: blocks uint8 (…, bytes) to
    float32 (…, V). has_offsets: a number is added to scale · code. has_parts: scales are codes themselves."""

    values: int
    bytes: int
    bits: int
    number: int
    decode: Callable[[Tensor], Tensor]
    has_offsets: bool = False
    has_parts: bool = False


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at some byte of every block, as float32 (…, 1)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of a block's bytes, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor, count: int) -> Tensor:
    """Of each byte the 8 / count numbers of some bits, the lowest first, (…, 8 / count, bytes)."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> shifts[:, None]) & ((1 << count) - 1)


def _fives(high: Tensor, packed: Tensor) -> Tensor:
    """32 codes of 5 bits: bit i of four bytes lies above the nibble i."""
    return _nibbles(packed) | _bits(high, 1).transpose(-1, -2).flatten(-2) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_fives(blocks[..., 2:6], blocks[..., 6:]).to(torch.float32) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _fives(blocks[..., 4:8], blocks[..., 8:]).to(torch.float32) + _half(blocks, 2)


def _of_parts(blocks: Tensor, codes: Tensor) -> Tensor:
    """Values of codes (…, 8, 32) by the 8 scales and 8 minima of 6 bits in the bytes 4 … 15: the first four lie whole in bytes
    0-3 and 4-7 of these, the low halves of the others in bytes 8-11, their two high bits on top of the first four's."""
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6) << 4), dim=-1).to(torch.float32)
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6) << 4), dim=-1).to(torch.float32)
    steps, lows = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (steps[..., None] * codes.to(torch.float32) - lows[..., None]).flatten(-2)


def _runs(packed: Tensor) -> Tensor:
    """(…, 8, 32): parts 2 i and 2 i + 1 are the low and the high halves of the i-th 32 bytes."""
    runs = packed.unflatten(-1, (4, 1, 32))
    return torch.cat((runs & 15, runs >> 4), dim=-2).flatten(-3, -2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_parts(blocks, _runs(blocks[..., 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    return _of_parts(blocks, _runs(blocks[..., 48:]) | _bits(blocks[..., 16:48], 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    # each half of 128 values has 64 bytes of low halves and 32 bytes of the upper two bits of four values
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))
    low = torch.cat((low & 15, low >> 4), dim=-2)
    codes = (low | _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2) << 4).flatten(-3).unflatten(-1, (16, 16))
    scales = _half(blocks, 208) * blocks[..., 192:208].view(torch.int8).to(torch.float32)
    return (scales[..., None] * (codes.to(torch.float32) - 32)).flatten(-2)


#: The numbers of IQ4_NL's codes (kvalues_iq4nl), and twice those of floats of 4 bits (e2m1).
PLACES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def _looked_up(packed: Tensor, table: tuple[float, ...]) -> Tensor:
    """What a table has at the places in the low halves of a block's bytes, then in the high ones."""
    return torch.tensor(table, dtype=torch.float32, device=packed.device)[_nibbles(packed).to(torch.int64)]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _looked_up(blocks[..., 2:], PLACES)


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _bits(blocks[..., 4:8], 4).transpose(-1, -2).flatten(-2)
    high = _bits(blocks[..., 2:4], 2).transpose(-1, -2).flatten(-2)
    steps = _half(blocks, 0) * ((low | high << 4).to(torch.float32) - 32)
    return (steps[..., None] * _looked_up(blocks[..., 8:].unflatten(-1, (8, 16)), PLACES)).flatten(-2)


def _mxfp4(blocks: Tensor) -> Tensor:
    return powers_of_two(blocks[..., :1]) * _looked_up(blocks[..., 1:], E2M1_DOUBLED)


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(e − 128) of bytes e, exactly, float32: half of the scale that e stands for."""
    wide = exponents.to(torch.int32)
    # below the normal numbers for the smallest two
    return torch.where(wide < 2, 0x00200000 << wide.clamp(max=1), (wide - 1).clamp(min=0) << 23).view(torch.float32)


#: By the type's name.
BLOCK_FORMS = {
    "Q5_0": BlockForm(32, 22, 5, 6, _q5_0),
    "Q5_1": BlockForm(32, 24, 5, 7, _q5_1, has_offsets=True),
    "Q4_K": BlockForm(256, 144, 4, 12, _q4_k, has_offsets=True, has_parts=True),
    "Q5_K": BlockForm(256, 176, 5, 13, _q5_k, has_offsets=True, has_parts=True),
    "Q6_K": BlockForm(256, 210, 6, 14, _q6_k, has_parts=True),
    "IQ4_NL": BlockForm(32, 18, 4, 20, _iq4_nl),
    "IQ4_XS": BlockForm(256, 136, 4, 23, _iq4_xs, has_parts=True),
    "MXFP4": BlockForm(32, 17, 4, 39, _mxfp4),
}


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]).to(torch.float32) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]).to(torch.float32) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[..., 2:].view(torch.int8).to(torch.float32)


#: Types that have a scheme of integers, and whose blocks the kernels pack as well.
INTEGER_FORMS = {
    "Q4_0": BlockForm(32, 18, 4, 2, _q4_0),
    "Q4_1": BlockForm(32, 20, 4, 3, _q4_1, has_offsets=True),
    "Q8_0": BlockForm(32, 34, 8, 8, _q8_0),
}
#: Weights and bytes of a block of MXFP4.
MXFP4_BLOCK, _MXFP4_BYTES = 32, 17


def mxfp4_codes(blocks: Tensor) -> Tensor:
    """The codes in rows of blocks (…, P): (…, G, 16), in the order of GGUF. A view."""
    return blocks.unflatten(-1, (-1, _MXFP4_BYTES))[..., 1:]


def mxfp4_exponents(blocks: Tensor) -> Tensor:
    """The exponents of the scales in rows of blocks (…, P): (…, G). A view."""
    return blocks.unflatten(-1, (-1, _MXFP4_BYTES))[..., 0]


def halves_of_neighbours(packed: Tensor) -> Tensor:
    """Codes (…, 16), two neighbours a byte, the first low, as GGUF has them: the first 16 in the low halves, the others in the
    high ones."""
    codes = unpack(packed)
    return codes[..., : MXFP4_BLOCK // 2] | codes[..., MXFP4_BLOCK // 2 :] << 4


def _neighbours_of_halves(packed: Tensor) -> Tensor:
    return pack(_nibbles(packed))


def float_settings(strategy: str, group: int) -> dict[str, Any]:
    """`weights` of a group of compressed-tensors with floats of 4 bits."""
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }


def is_float_of_four_bits(weights: Mapping[str, Any], group: int) -> bool:
    """Whether a group of compressed-tensors has floats of 4 bits in groups of this size."""
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True))
    return kind == ("float", 4, group, True)


@dataclass(frozen=True)
class GgufBlocks(Scheme):
    """codes: the blocks of a row one after the other, uint8 (…, N, bytes). kind: the number type."""

    kind: str

    name = "gguf"

    def __post_init__(self) -> None:
        assert self.kind in BLOCK_FORMS, self.kind

    @property
    def form(self) -> BlockForm:
        """What the type is."""
        return BLOCK_FORMS[self.kind]

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        raise ConfigError(
            "scheme: gguf is what GGUF files hold; make one of the model: bessemer export MODEL out.gguf --dtype q4_k_m"
        )

    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        blocks, rest = divmod(shape[-1], self.form.values)
        assert not rest, (shape, self)
        return {"codes": TensorSpec((*shape[:-1], blocks * self.form.bytes), torch.uint8)}

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        raise ConfigError(f"{self.kind}: codes of this type are chosen by an export to GGUF alone")

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.form.decode(tensors["codes"].unflatten(-1, (-1, self.form.bytes))).flatten(-2)

    def kernel_weight(self, tensors: Mapping[str, Tensor]) -> BlockWeight:
        blocks = tensors["codes"]
        return BlockWeight(blocks, self.kind, blocks.shape[-1] // self.form.bytes * self.form.values)

    @classmethod
    def of_described(cls, values: Mapping[str, object]) -> Self | None:
        if values.get("scheme") != cls.name:
            return None
        return cls(**{name: str(value) for name, value in values.items() if name != "scheme"})

    def compressed(self, role: MatrixRole) -> CompressedForm | None:
        if self.kind != "MXFP4" or role != "block":
            return None

        def tensors(outputs: int, inputs: int) -> list[FileTensor]:
            groups = inputs // MXFP4_BLOCK
            codes, exponents = TensorSpec((outputs, inputs // 2), torch.uint8), TensorSpec((outputs, groups), torch.uint8)

            def read(packed: Tensor) -> Tensor:
                return halves_of_neighbours(packed.unflatten(-1, (groups, MXFP4_BLOCK // 2)))

            def written(halves: Tensor) -> Tensor:
                return _neighbours_of_halves(halves).flatten(-2)

            return [
                FileTensor("weight_packed", "codes", codes, written, read, mxfp4_codes),
                FileTensor("weight_scale", "codes", exponents, Tensor.contiguous, whole, mxfp4_exponents),
            ]

        return CompressedForm("mxfp4-pack-quantized", float_settings("group", MXFP4_BLOCK), None, tensors)

    @classmethod
    def of_compressed(cls, weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None) -> Self | None:
        return cls("MXFP4") if is_float_of_four_bits(weights, MXFP4_BLOCK) else None

    def gguf_type(self, inputs: int) -> str | None:
        return self.kind

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return cls(kind) if kind in BLOCK_FORMS else None

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        blocks.view(np.uint8)[:] = tensors["codes"].reshape(-1).numpy()

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        return {"codes": torch.from_numpy(blocks.view(np.uint8).copy())}
