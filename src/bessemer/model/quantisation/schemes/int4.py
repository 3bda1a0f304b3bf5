"""Weights of 4 bits: codes 0 … 15, two a byte, a scale for each group of inputs.

The zero is 8, or a code of each group's own. Files of llama.cpp have a third kind, scale · code + offset, whose zero is no
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bessemer.model.quantisation.config import GROUP_SIZES, QuantizeConfig
from bessemer.model.quantisation.packing import bytes_of_words, pack, unpack, words_of_bytes
from bessemer.model.quantisation.rounding import MIDDLE
from bessemer.model.quantisation.schemes.base import Place, Scheme, TensorSpec
from bessemer.model.quantisation.schemes.int8 import Int8
from bessemer.model.quantisation.schemes.integers import BLOCK, PACKED, IntegerScheme, Packing, block_column, largest_group


@dataclass(frozen=True)
class Int4(IntegerScheme):
    """Codes uint8, of two weights each, the even one low."""

    name = "int4"
    bits = 4

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        asked = config.group_size if config.scheme == cls.name and config.group_size else GROUP_SIZES[0]
        size = largest_group(inputs, asked)
        if size is None:
            return Int8(), f"which {asked} does not divide: 8 bits, a scale for each output"
        note = None if size == asked else f"which {asked} does not divide: groups of {size}"
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

    def compressed_format(self, place: Place) -> str | None:
        return None if place == "embedding" or self.zero == "offset" else PACKED

    def packing(self, inputs: int) -> Packing:
        return words_of_bytes, bytes_of_words

    def gguf_type(self, inputs: int) -> str | None:
        if not self.in_blocks(inputs):
            return None
        return "Q4_0" if self.zero == "fixed" else "Q4_1"

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return {"Q4_0": cls(BLOCK), "Q4_1": cls(BLOCK, "offset")}.get(kind)

    # a block holds its first 16 codes in the low halves of its bytes and the others in the high ones; we hold neighbours in a
    # byte

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        super().write_blocks(tensors, blocks)
        wide = unpack(tensors["codes"]).reshape(-1, BLOCK)
        blocks["q"] = (wide[:, : BLOCK // 2] | (wide[:, BLOCK // 2 :] << 4)).numpy()
        if self.zero == "offset":
            blocks["m"] = self.in_each_block(tensors, tensors["offsets"])
        elif self.zero == "code":
            blocks["m"] = self.in_each_block(tensors, -tensors["scales"] * tensors["zeros"].to(torch.float32))

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        halves = torch.from_numpy(blocks["q"].copy())
        codes = pack(torch.cat((halves & 15, halves >> 4), dim=-1)).view(-1)
        found = {"codes": codes, "scales": block_column(blocks, "d")}
        return found | ({"offsets": block_column(blocks, "m")} if self.zero == "offset" else {})
