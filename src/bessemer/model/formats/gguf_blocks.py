"""Number types of GGUF files: decoded to float32, and converted to and from our codes.

A quantised tensor is a run of blocks. A block holds the small whole numbers q of 32 neighbouring values (256 in the K types)
and what turns them back: value = d·q, or d·q + m. The layouts are those of llama.cpp's `ggml-common.h`; all little-endian.
Encoding is left to the `gguf` package, which keeps llama.cpp's rounding.

Q4_0, Q4_1 and Q8_0 are groups of 32 neighbours with a scale each, and Q4_1 has an offset beside it: schemes hold their codes
as they are, and no number changes. Nor does one of Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS and MXFP4, whose blocks a
scheme holds as bytes. All other types are encoded again in codes of 8 bits, as Q8_0 has them, and so are weights whose parts
have several types in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.environment import usable_cores
from bessemer.model.cpu_kernels import library
from bessemer.model.families.layout import Stored
from bessemer.model.quantisation.base import Codes, Scheme, first_scheme
from bessemer.model.quantisation.blocks import BLOCK_FORMS, INTEGER_FORMS
from bessemer.model.quantisation.integers import BLOCK, LARGEST_INT8
from bessemer.model.quantisation.schemes import Int8

Floats = NDArray[np.float32]
Blocks = NDArray[np.void]
Bytes = NDArray[np.uint8]


class BlockType(NamedTuple):
    """A number type: values of a block, the block's fields in the file, and what decodes blocks to rows of values."""

    name: str
    values: int
    layout: np.dtype
    decode: Callable[[Blocks], Floats]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.layout.itemsize


def dequantise(raw: bytes | memoryview | Bytes, kind: BlockType) -> Floats:
    """The values of whole blocks, one after the other, float32."""
    return kind.decode(np.frombuffer(raw, kind.layout)).reshape(-1)


def _f32(blocks: Blocks) -> Floats:
    return blocks["d"]


def _f16(blocks: Blocks) -> Floats:
    return blocks["d"].astype(np.float32)


def _bf16(blocks: Blocks) -> Floats:
    return (blocks["d"].astype(np.uint32) << 16).view(np.float32)


def _of_form(kind: str) -> Callable[[Blocks], Floats]:
    """What decodes the blocks of a type whose form is described."""
    form = (BLOCK_FORMS | INTEGER_FORMS)[kind]

    def decode(blocks: Blocks) -> Floats:
        # torch takes no memory that is only for reading
        raw = torch.from_numpy(blocks.view(np.uint8).reshape(-1, form.bytes).copy())
        return form.decode(raw).numpy()

    return decode


def _layout(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


def _by_package(name: str, values: int, *fields: tuple) -> BlockType:
    """A type that the `gguf` package decodes."""

    def decode(blocks: Blocks) -> Floats:
        from gguf import GGMLQuantizationType, quants

        decoded: Floats = quants.dequantize(blocks.view(np.uint8).reshape(len(blocks), -1), GGMLQuantizationType[name])
        return decoded

    return BlockType(name, values, _layout(*fields), decode)


_D, _M = ("d", "<f2"), ("m", "<f2")
_HIGH, _HALVES = ("high", "<u4"), ("q", "u1", 16)
_SCALES = ("scales", "u1", 12)

#: By llama.cpp's number of the type.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, _layout(("d", "<f4")), _f32),
    1: BlockType("F16", 1, _layout(_D), _f16),
    2: BlockType("Q4_0", 32, _layout(_D, _HALVES), _of_form("Q4_0")),
    3: BlockType("Q4_1", 32, _layout(_D, _M, _HALVES), _of_form("Q4_1")),
    6: BlockType("Q5_0", 32, _layout(_D, _HIGH, _HALVES), _of_form("Q5_0")),
    7: BlockType("Q5_1", 32, _layout(_D, _M, _HIGH, _HALVES), _of_form("Q5_1")),
    8: BlockType("Q8_0", 32, _layout(_D, ("q", "i1", 32)), _of_form("Q8_0")),
    12: BlockType("Q4_K", 256, _layout(_D, _M, _SCALES, ("q", "u1", 128)), _of_form("Q4_K")),
    13: BlockType("Q5_K", 256, _layout(_D, _M, _SCALES, ("high", "u1", 32), ("q", "u1", 128)), _of_form("Q5_K")),
    14: BlockType("Q6_K", 256, _layout(("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D), _of_form("Q6_K")),
    30: BlockType("BF16", 1, _layout(("d", "<u2")), _bf16),
    39: BlockType("MXFP4", 32, _layout(("e", "u1"), _HALVES), _of_form("MXFP4")),
    20: BlockType("IQ4_NL", 32, _layout(_D, _HALVES), _of_form("IQ4_NL")),
    23: BlockType("IQ4_XS", 256, _layout(_D, ("scales", "u1", 6), ("q", "u1", 128)), _of_form("IQ4_XS")),
    # what few files have, and files of very few bits: decoded by the gguf package
    10: _by_package("Q2_K", 256, ("scales", "u1", 16), ("q", "u1", 64), _D, _M),
    11: _by_package("Q3_K", 256, ("high", "u1", 32), ("q", "u1", 64), _SCALES, _D),
    16: _by_package("IQ2_XXS", 256, _D, ("q", "u1", 64)),
    17: _by_package("IQ2_XS", 256, _D, ("q", "u1", 64), ("scales", "u1", 8)),
    18: _by_package("IQ3_XXS", 256, _D, ("q", "u1", 96)),
    19: _by_package("IQ1_S", 256, _D, ("q", "u1", 32), ("high", "u1", 16)),
    21: _by_package("IQ3_S", 256, _D, ("q", "u1", 104), ("scales", "u1", 4)),
    22: _by_package("IQ2_S", 256, _D, ("q", "u1", 72), ("scales", "u1", 8)),
    29: _by_package("IQ1_M", 256, ("q", "u1", 48), ("scales", "u1", 8)),
    34: _by_package("TQ1_0", 256, ("q", "u1", 52), _D),
    35: _by_package("TQ2_0", 256, ("q", "u1", 64), _D),
    40: _by_package("NVFP4", 64, ("e", "u1", 4), ("q", "u1", 32)),
}

#: Names of the types that are not read, for the error that says so.
OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}


# Shapes: N outputs, K inputs, G blocks of a row.

#: Scheme of weights whose quantised type has no scheme of its own, or that have several types.
ENCODED = Int8(BLOCK)
_BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}
_NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
#: Values that one thread decodes at a time without kernels: they fit its cache.
_NEAR_VALUES = 1 << 16


@cache
def scheme_of(kind: str) -> Scheme | None:
    """The scheme whose codes blocks of a type hold as they are; None where there is none."""
    return first_scheme(lambda scheme: scheme.of_gguf(kind))


def keeps_rows(view: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a view of a weight only selects and reorders rows, so that it applies to rows of codes as well."""
    # longer than every other dimension
    width = max(shape) + 1
    try:
        return view(torch.empty(*shape[:-1], width, device="meta")).shape[-1] == width
    except RuntimeError:
        return False


def read_codes(raw: bytes, kind: str) -> dict[str, Tensor]:
    """The tensors of the type's scheme that whole blocks hold, one after the other, flat."""
    scheme = scheme_of(kind)
    assert scheme is not None, kind
    return scheme.read_blocks(np.frombuffer(raw, _block(kind).layout))


def splits_blocks(kind: str) -> bool:
    """Whether `split_blocks` takes the blocks of a type apart here."""
    return kind in INTEGER_FORMS and library() is not None


def split_blocks(raw: Tensor, kind: str, made: Mapping[str, Tensor]) -> bool:
    """Fill the tensors of a type's scheme with whole blocks, uint8 (bytes,), on all cores; False where the kernels are not
    there, or do not know the type."""
    kernels = library()
    if kernels is None or not {"codes", "scales"} <= made.keys() <= {"codes", "scales", "offsets"}:
        return False
    assert all(tensor.dtype == torch.float32 for name, tensor in made.items() if name != "codes"), kind
    codes, scales, offsets = (made[name].data_ptr() if name in made else None for name in ("codes", "scales", "offsets"))
    blocks = len(raw) // _block(kind).bytes
    return bool(kernels.bessemer_split_blocks(_NUMBERS[kind], raw.data_ptr(), blocks, codes, scales, offsets, usable_cores()))


def is_quantised_type(kind: str) -> bool:
    """Whether a type is quantised: blocks of integers with scales."""
    return _BY_NAME[kind].values > 1


def encode_blocks(raw: NDArray[np.uint8], kind: str, codes: NDArray[np.int8], scales: Floats) -> None:
    """Encode whole blocks of a quantised type in codes of 8 bits: `codes`, one for each value, and `scales`, one for every 32,
    float32 numbers that float16 holds, are written. The kernels do it where they are there and know the type, on all cores."""
    kernels, block, threads = library(), _block(kind), usable_cores()
    blocks, places = len(raw) // block.bytes, (codes.ctypes.data, scales.ctypes.data)
    if kernels is not None and kernels.bessemer_encode_blocks(_NUMBERS[kind], raw.ctypes.data, blocks, *places, threads):
        return
    step = _NEAR_VALUES // block.values

    def encode_some(first: int) -> None:
        last = min(first + step, blocks)
        values = dequantise(raw[first * block.bytes : last * block.bytes], block)
        begin, end = first * block.values, last * block.values
        codes[begin:end], scales[begin // BLOCK : end // BLOCK] = encode_values(values)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(encode_some, range(0, blocks, step)):
            pass


def encode_values(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes of 8 bits of float32 values, and a scale for every 32: the largest magnitude becomes ±127. A group that is not
    finite has a NaN for a scale."""
    groups = values.reshape(-1, BLOCK)
    most = np.maximum(groups.max(1), -groups.min(1))
    counts = most >= 2.0**-100
    finite = np.isfinite(most)
    factors = np.divide(LARGEST_INT8, most, out=np.zeros_like(most), where=finite & counts)
    # groups that are not finite, and scales that float16 cannot hold
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(groups * factors[:, None])
        steps[~finite] = 0
        scales = np.where(finite, most / np.float32(LARGEST_INT8), np.float32("nan"))
        scales[finite & ~counts] = 0
        return steps.reshape(-1).astype(np.int8), scales.astype(np.float16).astype(np.float32)


def write_codes(codes: Codes, kind: str, inputs: int) -> np.ndarray:
    """Codes of rows of K inputs as blocks, (rows, bytes of a row); the blocks of a larger group share its scale."""
    block = _block(kind)
    rows = codes.tensors["codes"].numel() // codes.tensors["codes"].shape[-1]
    blocks = np.zeros(rows * inputs // block.values, block.layout)
    codes.scheme.write_blocks(codes.tensors, blocks)
    return blocks.view(np.uint8).reshape(rows, inputs // block.values * block.bytes)


def _block(kind: str) -> BlockType:
    return _BY_NAME[kind]


def packed_codes(stored: Stored, ours: Mapping[str, Codes]) -> Codes:
    """The codes of a file's tensor, from rows of our weights."""
    first = ours[stored.views[0].name]
    found = {}
    for part in first.tensors:
        tensors = {place.name: ours[place.name].tensors[part] for place in stored.views}
        plain = Stored(stored.name, stored.views, stored.dim).pack(tensors)
        found[part] = plain.reshape(-1, plain.shape[-1])
    return Codes(first.scheme, found)
