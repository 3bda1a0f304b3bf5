"""Weights of 8 bits: codes −127 … 127, a scale for each output, or for each group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.packing import int8_of_words, words_of_int8
from bessemer.model.quantisation.schemes.base import Place, Scheme, TensorSpec
from bessemer.model.quantisation.schemes.integers import (
    BLOCK,
    NAIVE,
    PACKED,
    IntegerScheme,
    Packing,
    block_column,
    largest_group,
)


@dataclass(frozen=True)
class Int8(IntegerScheme):
    """Codes int8, symmetric."""

    name = "int8"
    bits = 8

    def __post_init__(self) -> None:
        assert self.zero == "fixed", "codes of 8 bits are symmetric"

    @classmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        asked = None if is_end else config.group_size
        if asked is None:
            return cls(), None
        size = largest_group(inputs, asked)
        if size == asked:
            return cls(size), None
        given = f"groups of {size}" if size else "8 bits, a scale for each output"
        return cls(size), f"which {asked} does not divide: {given}"

    def code_spec(self, *shape: int) -> TensorSpec:
        return TensorSpec(shape, torch.int8)

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors["scales"]
        grouped = tensors["codes"].to(torch.float32).unflatten(-1, (scales.shape[-1], -1))
        return (grouped * scales[..., None]).flatten(-2)

    def compressed_format(self, place: Place) -> str | None:
        # a tied head shares the tensor `weight` with the embedding, and no other
        return PACKED if place == "block" else NAIVE

    def packing(self, inputs: int) -> Packing:
        return words_of_int8, partial(int8_of_words, inputs=inputs)

    def gguf_type(self, inputs: int) -> str | None:
        return "Q8_0" if self.in_blocks(inputs) else None

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        return cls(BLOCK) if kind == "Q8_0" else None

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        super().write_blocks(tensors, blocks)
        blocks["q"] = tensors["codes"].reshape(-1, BLOCK).numpy()

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        return {"codes": torch.from_numpy(blocks["q"].reshape(-1)), "scales": block_column(blocks, "d")}
