"""Schemes of whole numbers with a scale for each group of neighbours: weight = scale · (code − zero).

A group is `group_size` neighbours of a row, or the whole row. Scales and offsets are float32 numbers that float16 holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from bessemer.model.families.layout import whole
from bessemer.model.quantisation.config import GROUP_SIZES
from bessemer.model.quantisation.packing import words_of_zeros, zeros_of_words
from bessemer.model.quantisation.rounding import round_to_nearest
from bessemer.model.quantisation.schemes.base import Codes, CompressedForm, FileTensor, KernelWeight, Place, Scheme, TensorSpec

# Shapes: N outputs, K inputs, G groups of a row.

#: Forms of compressed-tensors: int32 words of several codes; int8, with int8 activations and without.
PACKED, INTEGERS, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"
#: Weights of a block of GGUF.
BLOCK = 32

_ROWS_OF_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}

#: From codes to words of compressed-tensors, and back.
Packing = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class IntegerScheme(Scheme):
    """group_size: weights that share a scale; None: all of an output's.

    zero: the code that stands for 0: `fixed` (0, or 8 at 4 bits), `code` (a code of each group's own), `offset` (none: each
    group has a number that is added).
    """

    group_size: int | None = None
    zero: Literal["fixed", "code", "offset"] = "fixed"

    bits: ClassVar[int]

    @abstractmethod
    def code_spec(self, *shape: int) -> TensorSpec:
        """The codes of a matrix (…, N, K)."""

    @abstractmethod
    def compressed_format(self, place: Place) -> str | None:
        """Name of the form in which compressed-tensors keeps a matrix; None where it has none."""

    @abstractmethod
    def packing(self, inputs: int) -> Packing:
        """The codes of rows of K inputs as words."""

    def group_of(self, inputs: int) -> int:
        """The group's size in a matrix with K inputs."""
        return self.group_size or inputs

    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        size = self.group_of(shape[-1])
        assert shape[-1] % size == 0, (shape, self)
        groups = (*shape[:-1], shape[-1] // size)
        found = {"codes": self.code_spec(*shape), "scales": TensorSpec(groups, torch.float32)}
        if self.zero == "code":
            found["zeros"] = TensorSpec(groups, torch.uint8)
        if self.zero == "offset":
            found["offsets"] = TensorSpec(groups, torch.float32)
        return found

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        return round_to_nearest(weight, self, search_clip=search_clip)

    def kernel_weight(self, tensors: Mapping[str, Tensor]) -> KernelWeight | None:
        codes = tensors["codes"]
        size = self.group_of(codes.shape[-1] * 8 // self.bits)
        return KernelWeight(codes, tensors["scales"], size, tensors.get("zeros"), tensors.get("offsets"))

    def described(self) -> dict[str, Any]:
        activation_bits = 16 if self.is_weight_only else 8
        return {"bits": self.bits, "group_size": self.group_size, "zero": self.zero, "activation_bits": activation_bits}

    @classmethod
    def of_described(cls, values: Mapping[str, Any]) -> Self | None:
        given = {"bits": 8, "group_size": None, "zero": "fixed", "activation_bits": 16} | dict(values)
        if len(given) > 4 or given["bits"] != cls.bits or given["activation_bits"] != (16 if cls.is_weight_only else 8):
            return None
        return cls(given["group_size"], given["zero"])

    def compressed(self, place: Place) -> CompressedForm | None:
        name = self.compressed_format(place)
        if name is None:
            return None
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.zero == "fixed",
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        activations = None if self.is_weight_only else dict(_ROWS_OF_INT8)

        def tensors(outputs: int, inputs: int) -> list[FileTensor]:
            return self._file_tensors(name, outputs, inputs)

        return CompressedForm(name, weights, activations, tensors)

    def _file_tensors(self, form: str, outputs: int, inputs: int) -> list[FileTensor]:
        groups = inputs // self.group_of(inputs)
        if form == PACKED:
            words = TensorSpec((outputs, -(-inputs * self.bits // 32)), torch.int32)
            shape = torch.tensor([outputs, inputs])
            found = [
                FileTensor("weight_packed", "codes", words, *self.packing(inputs)),
                FileTensor("weight_shape", "codes", TensorSpec((2,), torch.int64), lambda _: shape, None),
            ]
        else:
            found = [FileTensor("weight", "codes", TensorSpec((outputs, inputs), torch.int8), whole, whole)]
        halves = TensorSpec((outputs, groups), torch.float16)
        found.append(FileTensor("weight_scale", "scales", halves, Tensor.half, Tensor.float))
        if self.zero == "code":
            words = TensorSpec((-(-outputs // 8), groups), torch.int32)
            unpack = partial(zeros_of_words, outputs=outputs)
            found.append(FileTensor("weight_zero_point", "zeros", words, words_of_zeros, unpack))
        return found

    @classmethod
    def of_compressed(cls, weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None) -> Self | None:
        strategy, symmetric = weights.get("strategy"), weights.get("symmetric", True)
        if weights.get("type", "int") != "int" or weights.get("num_bits") != cls.bits or (cls.bits == 8 and not symmetric):
            return None
        if strategy not in ("channel", "group") or weights.get("actorder") in ("group", True):
            return None
        if (input_activations is None) is not cls.is_weight_only:
            return None
        if input_activations is not None:
            of_rows = input_activations.get("dynamic") is True and input_activations.get("num_bits") == 8
            if not of_rows or strategy != "channel":
                return None
        return cls(weights.get("group_size") if strategy == "group" else None, "fixed" if symmetric else "code")

    def in_blocks(self, inputs: int) -> bool:
        """Whether rows of K inputs are whole blocks of GGUF, each with one scale."""
        return inputs % BLOCK == 0 and self.group_of(inputs) % BLOCK == 0

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        blocks["d"] = self.in_each_block(tensors, tensors["scales"])

    def in_each_block(self, tensors: Mapping[str, Tensor], values: Tensor) -> np.ndarray:
        """A number of each group as float16, for each of the group's blocks."""
        inputs = tensors["codes"].shape[-1] * 8 // self.bits
        repeats = self.group_of(inputs) // BLOCK
        return np.asarray(values.to(torch.float16).repeat_interleave(repeats, dim=-1).reshape(-1).numpy())


def block_column(blocks: np.ndarray, field: str) -> Tensor:
    """A number of every block, float32."""
    return torch.from_numpy(blocks[field].astype(np.float32))


def largest_group(inputs: int, most: int) -> int | None:
    """The largest size of a group, at most `most`, that divides a row; None where none does."""
    return next((size for size in GROUP_SIZES if size <= most and inputs % size == 0), None)
