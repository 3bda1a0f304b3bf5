"""Integer codes: weight = scale · (code − zero), rounding to nearest, and packing.

A scale is shared by a group, `group_size` neighbours of a row or the whole row. Scales and offsets are float32 numbers that
float16 holds.

Plain rounding takes the scale at which the group's extremes are the extreme codes. The clip search tries smaller ranges, in
which the extremes are cut off and everything else is finer, and keeps for each group the one with the smallest squared error.

Codes of 4 bits are packed two a byte, or in words of 32 bits as compressed-tensors has them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.families.layout import whole
from bessemer.model.quantisation.base import Codes, CompressedForm, FileTensor, KernelWeight, MatrixRole, Scheme, TensorSpec
from bessemer.model.quantisation.config import GROUP_SIZES

# Shapes: N outputs, K inputs, G groups of a row, P bytes of a row.


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, uint8 (…, K), two a byte: the even ones in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`, uint8 (…, K)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def words_of_bytes(packed_NP: Tensor) -> Tensor:
    """Bytes as int32, four each; the first is in the lowest bits."""
    # flattened first: a dimension of one element may have any stride, and the view as int32 needs contiguous bytes
    return packed_NP.reshape(-1).view(torch.int32).view(packed_NP.shape[0], -1)


def bytes_of_words(words: Tensor) -> Tensor:
    """The bytes of `words_of_bytes`."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def words_of_int8(codes_NK: Tensor) -> Tensor:
    """int8 as int32, four each, counted from −128 and filled with zeros."""
    shifted = codes_NK.contiguous().view(torch.uint8) ^ 128
    return words_of_bytes(functional.pad(shifted, (0, -shifted.shape[-1] % 4)))


def int8_of_words(words: Tensor, inputs: int) -> Tensor:
    """The codes of `words_of_int8`."""
    return (bytes_of_words(words)[:, :inputs] ^ 128).contiguous().view(torch.int8)


def words_of_zeros(zeros_NG: Tensor) -> Tensor:
    """Zeros 0 … 15 as int32, eight rows each."""
    rows_GN = functional.pad(zeros_NG.T, (0, -zeros_NG.shape[0] % 8))
    return words_of_bytes(pack(rows_GN)).T.contiguous()


def zeros_of_words(words: Tensor, outputs: int) -> Tensor:
    """The zeros of `words_of_zeros`."""
    return unpack(bytes_of_words(words.T))[:, :outputs].T.contiguous()


# Shapes: N outputs, K inputs, G groups of a row, S weights of a group.

#: Fractions of a group's range that the clip search tries.
CLIPS = tuple(1 - step / 40 for step in range(21))
#: The zero of codes that are symmetric at 4 bits.
MIDDLE = 8
#: The largest code of int8. Weights do not use −128, so that every code has a negative.
LARGEST_INT8 = 127
_LARGEST_INT4 = 15
_HALF_RANGE_INT4 = 7.5


class Grid(NamedTuple):
    """Scales, and zeros where the scheme has its own, of groups (…, 1): what turns a weight into a code."""

    scales: Tensor
    zeros: Tensor | None

    def codes(self, weights: Tensor, scheme: IntegerScheme) -> Tensor:
        """The nearest code of each weight, as a float."""
        steps = weights / self.scales.where(self.scales != 0, 1)
        if scheme.bits == 8:
            return steps.round().clamp(-LARGEST_INT8, LARGEST_INT8)
        zeros = MIDDLE if self.zeros is None else self.zeros
        return (steps.round() + zeros).clamp(0, _LARGEST_INT4)

    def weights(self, codes: Tensor, scheme: IntegerScheme) -> Tensor:
        """What codes stand for."""
        if scheme.bits == 4:
            codes = codes - (MIDDLE if self.zeros is None else self.zeros)
        return codes * self.scales

    def rounded(self, weights: Tensor, scheme: IntegerScheme) -> Tensor:
        """Each weight as its nearest code stands for."""
        return self.weights(self.codes(weights, scheme), scheme)


def find_grid(groups: Tensor, scheme: IntegerScheme, *, clip: float | Tensor = 1.0) -> Grid:
    """The grid of groups of weights, float32 (…, S), whose range is cut to `clip` of what it is; of a negative one the scale is
    negative, and the code that has no opposite, −8, serves the other sign.

    Symmetric: the largest magnitude becomes ±127, or ±7.5 at 4 bits (whose codes go from −8 to 7). Asymmetric: the smallest
    becomes 0, the largest 15, and 0 lies on a code. Scales are rounded to float16.
    """
    if scheme.zero == "fixed":
        largest = groups.abs().amax(-1, keepdim=True) * clip
        return Grid(_as_float16(largest / (LARGEST_INT8 if scheme.bits == 8 else _HALF_RANGE_INT4)), None)
    low = groups.amin(-1, keepdim=True).clamp(max=0) * clip
    high = groups.amax(-1, keepdim=True).clamp(min=0) * clip
    scales = _as_float16((high - low) / _LARGEST_INT4)
    zeros = (-low / scales.where(scales != 0, 1)).round().clamp(0, _LARGEST_INT4)
    return Grid(scales, zeros)


def _as_float16(scales: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return scales.clamp(-largest, largest).to(torch.float16).to(torch.float32)


def search_grid(groups: Tensor, scheme: IntegerScheme, importance: Tensor | None = None) -> Grid:
    """Of the grids of `CLIPS`, for each group the one with the smallest squared error of its weights.

    importance: weighs the squared errors, broadcast to the groups (…, S).
    """

    def error_of(grid: Grid) -> Tensor:
        squares = (grid.rounded(groups, scheme) - groups).square()
        return (squares if importance is None else squares * importance).sum(-1, keepdim=True)

    return best_grid((find_grid(groups, scheme, clip=clip) for clip in CLIPS), error_of)


def best_grid(grids: Iterable[Grid], error_of: Callable[[Grid], Tensor]) -> Grid:
    """For each group, the grid with the smallest error, (…, 1); the first of equals."""
    best: Grid | None = None
    least = torch.empty(0)
    for grid in grids:
        error = error_of(grid)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        zeros = None if best.zeros is None or grid.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best = Grid(torch.where(better, grid.scales, best.scales), zeros)
    assert best is not None
    return best


def in_groups(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    """Weights (…, K) as float32 groups (…, G, S)."""
    return weight.to(torch.float32).unflatten(-1, (-1, scheme.group_of(weight.shape[-1])))


def as_codes(codes: Tensor, grid: Grid, scheme: IntegerScheme) -> Codes:
    """Codes as floats (…, G, S), and their grid (…, G, 1), in the form in which they are kept."""
    flat = codes.flatten(-2)
    whole = flat.to(torch.int8) if scheme.bits == 8 else pack(flat.to(torch.uint8))
    zeros = {} if grid.zeros is None else {"zeros": grid.zeros[..., 0].to(torch.uint8)}
    return Codes(scheme, {"codes": whole.contiguous(), "scales": grid.scales[..., 0].contiguous(), **zeros})


def round_to_nearest(weight: Tensor, scheme: IntegerScheme, *, search_clip: bool = False) -> Codes:
    """A matrix (…, N, K) as codes; with `search_clip` by `search_grid`, else plainly (the baseline called RTN)."""
    groups = in_groups(weight, scheme)
    grid = search_grid(groups, scheme) if search_clip else find_grid(groups, scheme)
    return as_codes(grid.codes(groups, scheme), grid, scheme)


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
        """Shape and dtype of the codes of a matrix (…, N, K)."""

    @abstractmethod
    def compressed_format(self, role: MatrixRole) -> str | None:
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
        specs = {"codes": self.code_spec(*shape), "scales": TensorSpec(groups, torch.float32)}
        if self.zero == "code":
            specs["zeros"] = TensorSpec(groups, torch.uint8)
        if self.zero == "offset":
            specs["offsets"] = TensorSpec(groups, torch.float32)
        return specs

    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        return round_to_nearest(weight, self, search_clip=search_clip)

    def has_kernel(self, inputs: int) -> bool:
        return self.group_of(inputs) in (*GROUP_SIZES, inputs)

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

    def compressed(self, role: MatrixRole) -> CompressedForm | None:
        name = self.compressed_format(role)
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
