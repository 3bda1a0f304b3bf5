"""Conversion between GGUF's quantised blocks and our codes.

Q4_0, Q4_1 and Q8_0 are groups of 32 neighbours with a scale each, and Q4_1 has an offset beside it: schemes hold their codes
as they are, and no number changes. The other quantised types (the K types, Q5, MXFP4) are encoded again in codes of 8 bits, as
Q8_0 has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.environment import usable_cores
from bessemer.model.cpu_kernels.build import library
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, BlockType, Floats, dequantise
from bessemer.model.quantisation.registry import first_scheme
from bessemer.model.quantisation.rounding import LARGEST_INT8
from bessemer.model.quantisation.schemes.base import Codes, Scheme
from bessemer.model.quantisation.schemes.int8 import Int8
from bessemer.model.quantisation.schemes.integers import BLOCK

# Shapes: N outputs, K inputs, G blocks of a row.

#: The scheme of a weight whose blocks are of a quantised type that none has, or of several.
ENCODED = Int8(BLOCK)
_BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}
_NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
#: Values that one thread decodes at once where there are no kernels: they stay in its cache.
_NEAR_VALUES = 1 << 16


@cache
def scheme_of(kind: str) -> Scheme | None:
    """The scheme whose codes blocks of a type hold as they are; None where there is none."""
    return first_scheme(lambda scheme: scheme.of_gguf(kind))


def keeps_rows(view: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a view of a weight picks and orders rows alone, so that it can pick and order rows of codes."""
    # as no other dimension is long
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


def is_quantised_type(kind: str) -> bool:
    """Whether blocks of a type hold whole numbers and what turns them back."""
    return _BY_NAME[kind].values > 1


def encode_blocks(raw: NDArray[np.uint8], kind: str, codes: NDArray[np.int8], scales: Floats) -> None:
    """Encode whole blocks of a quantised type in codes of 8 bits: `codes`, one for each value, and `scales`, one for every 32,
    float32 numbers that float16 holds, are written. The kernels do it where they are there, on all cores."""
    kernels, block, threads = library(), _block(kind), usable_cores()
    blocks = len(raw) // block.bytes
    if kernels is not None:
        done = kernels.bessemer_encode_blocks(
            _NUMBERS[kind], raw.ctypes.data, blocks, codes.ctypes.data, scales.ctypes.data, threads
        )
        assert done, f"the kernels do not know {kind}"
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
    # of what is not finite, and of scales that float16 does not hold
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
    """The rows of our weights that a tensor of a file is made of, as codes."""
    first = ours[stored.places[0].name]
    found = {}
    for part in first.tensors:
        tensors = {place.name: ours[place.name].tensors[part] for place in stored.places}
        plain = Stored(stored.name, stored.places, stored.dim).pack(tensors)
        found[part] = plain.reshape(-1, plain.shape[-1])
    return Codes(first.scheme, found)
