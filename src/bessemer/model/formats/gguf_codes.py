"""Conversion between GGUF's quantised blocks and our codes.

Q4_0, Q4_1 and Q8_0 are groups of 32 neighbours with a scale each, and Q4_1 has an offset beside it: no number changes. A block
of 4 bits holds its first 16 codes in the low halves of its bytes and the others in the high ones; we hold neighbours in a byte.
The other quantised types (the K types, Q5, MXFP4) are encoded again in codes of 8 bits, as Q8_0 has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.environment import usable_cores
from bessemer.model.cpu_kernels.build import library
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, BlockType, Floats, dequantise
from bessemer.model.quantised_linear import LARGEST_INT8, Codes, Scheme, pack, unpack

# Shapes: N outputs, K inputs, G blocks of a row.

BLOCK = 32
#: The scheme of a weight that is opened from blocks of a type.
SCHEMES = {"Q4_0": Scheme(4, BLOCK), "Q4_1": Scheme(4, BLOCK, "offset"), "Q8_0": Scheme(8, BLOCK)}
#: The scheme of a weight whose blocks are of another quantised type, or of several.
ENCODED = SCHEMES["Q8_0"]
_BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}
_NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
#: Values that one thread decodes at once where there are no kernels: they stay in its cache.
_NEAR_VALUES = 1 << 16


def block_type(scheme: Scheme, inputs: int) -> str | None:
    """The type whose blocks hold codes of a scheme; None where a row is no whole number of blocks."""
    if inputs % BLOCK or scheme.group_of(inputs) % BLOCK:
        return None
    if scheme.bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.zero == "fixed" else "Q4_1"


def keeps_rows(view: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a view of a weight picks and orders rows alone, so that it can pick and order rows of codes."""
    # as no other dimension is long
    width = max(shape) + 1
    try:
        return view(torch.empty(*shape[:-1], width, device="meta")).shape[-1] == width
    except RuntimeError:
        return False


def empty_codes(scheme: Scheme, shape: tuple[int, ...]) -> Codes:
    """Room for the codes of a matrix, or a stack of them, of this shape; no zeros that are codes."""
    assert scheme.zero != "code", scheme
    kind = torch.uint8 if scheme.bits == 4 else torch.int8
    scales, offsets = (torch.empty(scheme.scale_shape(*shape)) for _ in range(2))
    return Codes(
        scheme,
        torch.empty(scheme.code_shape(*shape), dtype=kind),
        scales,
        offsets=offsets if scheme.zero == "offset" else None,
    )


def read_codes(raw: bytes, kind: str) -> Codes:
    """The codes that whole blocks of a type in `SCHEMES` hold, one after the other, (K,)."""
    blocks = np.frombuffer(raw, _block(kind).layout)

    def column(field: str) -> Tensor:
        return torch.from_numpy(blocks[field].astype(np.float32))

    if SCHEMES[kind].bits == 8:
        return Codes(SCHEMES[kind], torch.from_numpy(blocks["q"].reshape(-1)), column("d"))
    halves = torch.from_numpy(blocks["q"].copy())
    codes = pack(torch.cat((halves & 15, halves >> 4), dim=-1)).view(-1)
    return Codes(SCHEMES[kind], codes, column("d"), offsets=column("m") if kind == "Q4_1" else None)


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


def write_codes(codes: Codes, kind: str) -> np.ndarray:
    """Codes (…, K) as blocks, (rows, bytes of a row); the blocks of a larger group share its scale."""
    layout = _block(kind).layout
    inputs = codes.codes.shape[-1] * (2 if codes.scheme.bits == 4 else 1)
    repeats = codes.scheme.group_of(inputs) // BLOCK

    def column(values: Tensor) -> np.ndarray:
        return np.asarray(values.to(torch.float16).repeat_interleave(repeats, dim=-1).reshape(-1).numpy())

    whole = (codes.codes if codes.scheme.bits == 8 else unpack(codes.codes)).reshape(-1, BLOCK)
    blocks = np.zeros(len(whole), layout)
    blocks["d"] = column(codes.scales)
    if codes.scheme.bits == 8:
        blocks["q"] = whole.numpy()
    else:
        blocks["q"] = (whole[:, :16] | (whole[:, 16:] << 4)).numpy()
    if kind == "Q4_1":
        assert codes.added is not None
        blocks["m"] = column(codes.added)
    return blocks.view(np.uint8).reshape(-1, inputs // BLOCK * layout.itemsize)


def _block(kind: str) -> BlockType:
    return _BY_NAME[kind]


def parts_of(codes: Codes) -> dict[str, Tensor]:
    """The tensors that a scheme has, by name."""
    parts = {"codes": codes.codes, "scales": codes.scales, "zeros": codes.zeros, "offsets": codes.offsets}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def packed_codes(stored: Stored, ours: Mapping[str, Codes]) -> Codes:
    """The rows of our weights that a tensor of a file is made of, as codes."""
    first = ours[stored.places[0].name]
    found = {}
    for part in parts_of(first):
        tensors = {place.name: parts_of(ours[place.name])[part] for place in stored.places}
        plain = Stored(stored.name, stored.places, stored.dim).pack(tensors)
        found[part] = plain.reshape(-1, plain.shape[-1])
    return Codes(first.scheme, **found)
