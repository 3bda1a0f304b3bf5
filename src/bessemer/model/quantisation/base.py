"""The base class of quantisation schemes, and weights as codes.

A scheme is a frozen dataclass, whose fields are its settings for one matrix, and one entry of `SCHEMES`. What it does not
define has a default: PyTorch multiplies a weight that no kernel knows, and a weight that a file format has no place for is kept
under our own names or exported as floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.quantisation.config import SCHEMES, QuantizeConfig

# Shapes: N outputs, K inputs, G groups of a row, P bytes of a row of codes.

#: Role of a matrix: of a block, or an end of the model.
MatrixRole = Literal["block", "embedding", "head"]


class TensorSpec(NamedTuple):
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return prod(self.shape) * self.dtype.itemsize


class KernelWeight(NamedTuple):
    """A weight in the form that the compiled CPU kernels multiply: scales · (codes − zeros) per group of neighbours along K, or
    scales · codes + offsets.

    codes: int8 (N, K), or uint8 (N, K / 2) with two codes of 4 bits each, the even one low. scales: float32 (N, G), each a
    float16's value. zeros: uint8 (N, G); None: 8 for 4 bits, 0 for 8. offsets: float32 (N, G), of codes
    of 4 bits without zeros, each a float16's value.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    bias: Tensor | None = None


class BlockWeight(NamedTuple):
    """A weight as the blocks of a GGUF file, which the compiled CPU kernels pack as they are.

    blocks: uint8 (N, bytes of a row). kind: the number type, of `blocks.BLOCK_FORMS` or `INTEGER_FORMS`.
    inputs: K.
    """

    blocks: Tensor
    kind: str
    inputs: int
    bias: Tensor | None = None


class NarrowFloatWeight(NamedTuple):
    """A weight in floating point of 8 bits in the form that the compiled CPU kernels multiply: scales · codes per group of
    neighbours along K.

    codes: float8_e4m3fn (N, K), none of them NaN. scales: float32 (N, G), of the last group too, which may be shorter.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    bias: Tensor | None = None


#: A weight as the compiled CPU kernels multiply its codes.
CodedWeight = KernelWeight | BlockWeight | NarrowFloatWeight


class FloatWeight(NamedTuple):
    """A weight whose codes the compiled CPU kernels do not know, decoded: they multiply it as that of any layer.

    weight: float32 or bfloat16, (N, K).
    """

    weight: Tensor
    bias: Tensor | None = None


class FileTensor(NamedTuple):
    """A tensor of a matrix in a file of compressed-tensors: `NAME.` + suffix, made of one of the scheme's.

    pack and unpack: from ours, (N, …), and back; unpack is None for what says nothing new. within: a view of the part of ours
    that it is made of; None: of all.
    """

    suffix: str
    ours: str
    spec: TensorSpec
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor] | None
    within: Callable[[Tensor], Tensor] | None = None


class CompressedForm(NamedTuple):
    """A matrix (N, K) as the package compressed-tensors keeps it: name of the form, `weights` and `input_activations` of its
    group in `quantization_config`, and the tensors of its file."""

    format: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None
    tensors: Callable[[int, int], list[FileTensor]]


class Scheme(ABC):
    """How one matrix is quantised, kept, read and multiplied."""

    #: In `SCHEMES`.
    name: ClassVar[str]
    #: Whether activations stay floating point, so that the weight may be dequantised once.
    is_weight_only: ClassVar[bool] = True
    #: Whether the compiled CPU kernels multiply codes by activations of 8 bits.
    rounds_activations: ClassVar[bool] = True
    #: Whether `recoded` reads codes back from decoded weights.
    is_recoverable: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def choose(cls, inputs: int, config: QuantizeConfig, *, is_end: bool = False) -> tuple[Scheme, str | None]:
        """The scheme of a matrix with K inputs, and how it deviates from the settings, as the end of "matrices with K inputs,
        …"; None where it does not.

        is_end: of the embedding or the head, which the setting `head` chose.
        """

    @abstractmethod
    def tensors(self, *shape: int) -> dict[str, TensorSpec]:
        """The tensors by which a matrix (N, K), or a stack of them (…, N, K), is kept; `codes` is among them, and the rows of
        each are those of the matrix."""

    @abstractmethod
    def quantise(self, weight: Tensor, *, search_clip: bool = False) -> Codes:
        """A matrix (…, N, K), rounded to nearest. search_clip: the setting of that name."""

    @abstractmethod
    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weights that tensors stand for, float32, (…, N, K)."""

    def nbytes(self, *shape: int) -> int:
        """Memory of a matrix, or a stack of them."""
        return sum(spec.nbytes for spec in self.tensors(*shape).values())

    def product(self, hidden: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
        """hidden (…, K) by the weight's transpose, plus the bias, (…, N), in the type of `hidden`."""
        return functional.linear(hidden, weight.dequantised().to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))

    def kernel_weight(self, tensors: Mapping[str, Tensor]) -> CodedWeight | None:
        """A matrix as the compiled CPU kernels multiply it; None where they cannot.

        Those of `codes`, `scales`, `zeros` and `offsets` that it is made of are the scheme's own tensors of that name: a model
        that is served gives them up for the packed ones.
        """
        return None

    def has_kernel(self, inputs: int) -> bool:
        """Whether the compiled CPU kernels multiply the codes of matrices with K inputs. Those of other schemes are decoded
        once, when they are packed."""
        return type(self).kernel_weight is not Scheme.kernel_weight

    def recoded(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The codes that weights (…, N, K) were decoded from, which may have been rounded to bfloat16 since. tensors: the
        scheme's others, of the same rows."""
        raise NotImplementedError(f"{self.name} does not read codes back")

    def widened(self, stored: Codes) -> Codes | None:
        """Codes that meet quantised activations, in the type in which PyTorch multiplies them on this device; None where that
        is their own, or where activations stay floats."""
        return None

    def described(self) -> dict[str, Any]:
        """The scheme as plain values, for a folder in our own form."""
        return {"scheme": self.name, **vars(self)}

    @classmethod
    def of_described(cls, values: Mapping[str, Any]) -> Self | None:
        """The scheme of `described` values; None where they are another's. Raises TypeError or AssertionError for values that
        no scheme has."""
        if values.get("scheme") != cls.name:
            return None
        return cls(**{name: value for name, value in values.items() if name != "scheme"})

    def compressed(self, role: MatrixRole) -> CompressedForm | None:
        """The form in which compressed-tensors keeps a matrix of a role; None where it has none."""
        return None

    @classmethod
    def of_compressed(cls, weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None) -> Self | None:
        """The scheme of a group of compressed-tensors; None where that is another's."""
        return None

    def gguf_type(self, inputs: int) -> str | None:
        """The type of GGUF whose blocks hold these codes as they are; None where none does."""
        return None

    @classmethod
    def of_gguf(cls, kind: str) -> Self | None:
        """The scheme whose codes blocks of a type hold as they are; None where they do not."""
        return None

    def write_blocks(self, tensors: Mapping[str, Tensor], blocks: np.ndarray) -> None:
        """Fill the fields of a type's blocks, one for each 32 weights of a matrix."""
        raise NotImplementedError(f"{self.name} has no type of GGUF")

    def read_blocks(self, blocks: np.ndarray) -> dict[str, Tensor]:
        """The tensors that blocks hold, flat."""
        raise NotImplementedError(f"{self.name} has no type of GGUF")


@dataclass(frozen=True)
class Codes:
    """A matrix, or a stack of them, as the tensors of its scheme."""

    scheme: Scheme
    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Any) -> Codes:
        """Some rows, or one matrix of a stack."""
        return Codes(self.scheme, {name: tensor[rows] for name, tensor in self.tensors.items()})

    @classmethod
    def stack(cls, matrices: list[Codes]) -> Codes:
        """Matrices of one scheme as a stack."""
        first = matrices[0]
        return cls(first.scheme, {name: torch.stack([one.tensors[name] for one in matrices]) for name in first.tensors})

    def dequantised(self) -> Tensor:
        """The weights that the codes stand for, float32, (…, N, K)."""
        return self.scheme.dequantise(self.tensors)


def first_scheme(ask: Callable[[type[Scheme]], Scheme | None]) -> Scheme | None:
    """The first result that is not None, over the classes of all schemes, ours before others; None without one."""
    return next((found for plugin in SCHEMES.values() if (found := ask(plugin.load())) is not None), None)
