"""Codes between GGUF's blocks and our quantised weights, without a number changed.

Q4_0, Q4_1 and Q8_0 are groups of 32 neighbours with a scale each, and Q4_1 has an offset beside it. A block of 4 bits holds its
first 16 codes in the low halves of its bytes and the others in the high ones; we hold neighbours in a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, BlockType
from bessemer.model.quantised_linear import Codes, Scheme, pack, unpack

# Shapes: N outputs, K inputs, G blocks of a row.

BLOCK = 32
#: The scheme of a weight that is opened from blocks of a type.
SCHEMES = {"Q4_0": Scheme(4, BLOCK), "Q4_1": Scheme(4, BLOCK, "offset"), "Q8_0": Scheme(8, BLOCK)}
_BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}


def block_type(scheme: Scheme, inputs: int) -> str | None:
    """The type whose blocks hold codes of a scheme; None where a row is no whole number of blocks."""
    if inputs % BLOCK or scheme.group_of(inputs) % BLOCK:
        return None
    if scheme.bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.zero == "fixed" else "Q4_1"


def keeps_rows(view: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a view of a weight picks and orders rows alone, so that it can pick and order rows of codes."""
    width = max(shape) + 1  # as no other dimension is long
    try:
        return view(torch.empty(*shape[:-1], width, device="meta")).shape[-1] == width
    except RuntimeError:
        return False


def read_codes(raw: bytes, kind: str, shape: tuple[int, ...]) -> Codes:
    """The codes (…, K) that the blocks of a tensor of this shape hold."""
    blocks = np.frombuffer(raw, _BY_NAME[kind].layout)
    scheme = SCHEMES[kind]
    per_block = scheme.scale_shape(*shape)

    def column(field: str) -> Tensor:
        return torch.from_numpy(blocks[field].astype(np.float32)).view(per_block)

    if scheme.bits == 8:
        return Codes(scheme, torch.from_numpy(blocks["q"].astype(np.int8)).view(shape), column("d"))
    halves = torch.from_numpy(blocks["q"].astype(np.uint8))
    codes = pack(torch.cat((halves & 15, halves >> 4), dim=-1)).view(scheme.code_shape(*shape))
    return Codes(scheme, codes, column("d"), offsets=column("m") if kind == "Q4_1" else None)


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
