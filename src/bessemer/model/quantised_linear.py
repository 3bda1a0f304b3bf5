"""Linear layers whose weights are integers with a scale for each group of neighbours, and the embedding made of them.

    weight = scale · (code − zero)

A group is `group_size` neighbours of a row, or the whole row. At 8 bits codes are int8 and the zero is 0; at 4 bits they are
0 … 15, two a byte, and the zero is 8 or the group's own. Scales are float32 numbers that float16 holds. Files of llama.cpp
have a third kind of 4 bits, scale · code + offset, whose zero is no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.device import widest_float

# Shapes: N outputs, K inputs, G groups of a row, P bytes of a row (K, or K / 2 at 4 bits), M rows of activations.

#: The zero of codes that are symmetric at 4 bits.
MIDDLE = 8
#: The largest code of int8. Weights do without −128, so that a code can change its sign.
LARGEST_INT8 = 127
_HALF_RANGE_INT8 = 127.5
#: Products of two int8 numbers whose sum float32 holds exactly, whatever the order: each is at most 2^14, the sum 2^24.
_EXACT_IN_FLOAT32 = 1024


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantised. group_size: weights that share a scale; None: all of an output's.

    zero: the code that stands for 0: `fixed` (0, or 8 at 4 bits), `code` (a code of each group's own), `offset` (none: each
    group has a number that is added). activation_bits: 16: activations stay floating point; 8: they are quantised too, each
    row as it comes.
    """

    bits: int = 8
    group_size: int | None = None
    zero: Literal["fixed", "code", "offset"] = "fixed"
    activation_bits: int = 16

    def __post_init__(self) -> None:
        assert self.bits in (4, 8) and self.activation_bits in (8, 16), self
        assert self.zero == "fixed" or self.bits == 4, "codes of 8 bits are symmetric"
        assert self.activation_bits == 16 or (self.bits == 8 and self.group_size is None), "a row of int8 has one scale"

    def group_of(self, inputs: int) -> int:
        """The group's size in a matrix with `inputs` inputs."""
        return self.group_size or inputs

    def code_shape(self, *shape: int) -> tuple[int, ...]:
        """Shape of the codes of a matrix (…, N, K)."""
        return (*shape[:-1], shape[-1] // 2) if self.bits == 4 else shape

    def scale_shape(self, *shape: int) -> tuple[int, ...]:
        """Shape of the scales, and the zeros, of a matrix (…, N, K)."""
        return (*shape[:-1], shape[-1] // self.group_of(shape[-1]))


@dataclass(frozen=True)
class Codes:
    """A matrix, or a stack of them, as integers: codes (…, N, P), scales (…, N, G); zeros, uint8, and offsets, float32, are
    like the scales, or None where the scheme has none."""

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None

    def __getitem__(self, rows: Any) -> Codes:
        """Some rows, or one matrix of a stack."""
        zeros, offsets = (None if part is None else part[rows] for part in (self.zeros, self.offsets))
        return Codes(self.scheme, self.codes[rows], self.scales[rows], zeros, offsets)

    @property
    def added(self) -> Tensor | None:
        """What is added to scale · code, float32 like the scales: −scale · zero, or the offset; None where that is 0."""
        if self.offsets is not None or self.scheme.bits == 8:
            return self.offsets
        return -self.scales * (MIDDLE if self.zeros is None else self.zeros.to(torch.float32))

    def dequantised(self) -> Tensor:
        """The weights that the codes stand for, float32, (…, N, K)."""
        wide = unpack(self.codes) if self.scheme.bits == 4 else self.codes
        grouped = wide.to(torch.float32).unflatten(-1, (self.scales.shape[-1], -1))
        if self.offsets is not None:
            return (grouped * self.scales[..., None] + self.offsets[..., None]).flatten(-2)
        if self.zeros is not None:
            grouped = grouped - self.zeros[..., None].to(torch.float32)
        elif self.scheme.bits == 4:
            grouped = grouped - MIDDLE
        return (grouped * self.scales[..., None]).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, uint8 (…, K), two a byte: the even ones in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`, uint8 (…, K)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


#: Gives back the codes that it keeps in a form of its own: of the rows (…,) of a matrix, or all of them where None.
Keeper = Callable[[Tensor | None], Codes]


class QuantisedWeight(nn.Module):
    """A weight, (N, K) or a stack (E, N, K), kept as its codes.

    dtype: the type of what is read out of it, the model's; `.to(dtype)` changes that and never the codes or their scales.

    A packed copy may replace the codes (`release`): the buffers are None then, and `stored` reads the codes back from the copy
    on every access.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        assert shape[-1] % scheme.group_of(shape[-1]) == 0, (shape, scheme)
        self.scheme = scheme
        self.dtype = dtype
        self.shape = tuple(shape)
        self.dequantised_weight: Tensor | None = None
        self._keeper: Keeper | None = None
        kind = torch.uint8 if scheme.bits == 4 else torch.int8
        self.register_buffer("codes", torch.zeros(scheme.code_shape(*shape), dtype=kind))
        self.register_buffer("scales", torch.zeros(scheme.scale_shape(*shape), dtype=torch.float32))
        zeros = torch.zeros(scheme.scale_shape(*shape), dtype=torch.uint8) if scheme.zero == "code" else None
        self.register_buffer("zeros", zeros)
        offsets = torch.zeros(scheme.scale_shape(*shape), dtype=torch.float32) if scheme.zero == "offset" else None
        self.register_buffer("offsets", offsets)

    def take(self, stored: Codes) -> Self:
        """Hold these codes; returns itself."""
        assert stored.scheme.bits == self.scheme.bits and stored.codes.shape == self.scheme.code_shape(*self.shape), (
            stored.scheme
        )
        self.codes = stored.codes
        self.scales = stored.scales
        self.zeros = stored.zeros
        self.offsets = stored.offsets
        self._keeper = None
        return self

    def release(self, keeper: Keeper) -> None:
        """Hold the codes, scales and zeros no longer: `keeper` has them. Offsets stay."""
        self._keeper = keeper
        self.codes = self.scales = self.zeros = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Hold the codes again."""
        if self._keeper is not None:
            self.take(self.stored)

    @property
    def is_released(self) -> bool:
        """Whether another keeps the codes."""
        return self._keeper is not None

    @property
    def stored(self) -> Codes:
        """The codes with what they mean."""
        if self._keeper is not None:
            return self._keeper(None)
        return Codes(self.scheme, self.codes, self.scales, self.zeros, self.offsets)

    @property
    def device(self) -> torch.device:
        """Where the codes lie; they are kept by others on the processor alone."""
        return torch.device("cpu") if self.is_released else self.codes.device

    @property
    def group_size(self) -> int:
        """Neighbours along the inputs that share a scale."""
        return self.scheme.group_of(self.shape[-1])

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for. Dequantises on every access, except within `using_packed_matmuls`."""
        if self.dequantised_weight is not None:
            return self.dequantised_weight
        return self.stored.dequantised().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales, offsets = self.scales, self.offsets
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.is_released and self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
            self.offsets = None if offsets is None else offsets.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*arguments)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*arguments, **options)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"shape={self.shape}, {self.scheme}"


#: From inputs (…, K) to outputs (…, N), in the inputs' type.
Product = Callable[[Tensor], Tensor]


class QuantisedLinear(QuantisedWeight):
    """`nn.Linear` with a quantised weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__((out_features, in_features), scheme, dtype)
        self.in_features = in_features
        self.out_features = out_features
        #: Replaces the product for a time, from the same codes (`using_packed_matmuls`).
        self.packed_matmul: Product | None = None
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def activation_bits(self) -> int:
        """16, or 8 where activations are quantised too."""
        return self.scheme.activation_bits

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, K) to (…, N), in the type of `hidden`."""
        return self.product(hidden)

    def product(self, hidden: Tensor) -> Tensor:
        """The product with the weight's transpose, and the bias."""
        if self.packed_matmul is not None:
            return self.packed_matmul(hidden)
        if self.activation_bits == 8:
            return int8_product(hidden, self.stored, self.bias)
        weight_NK = self.stored.dequantised().to(hidden.dtype)
        return functional.linear(hidden, weight_NK, None if self.bias is None else self.bias.to(hidden.dtype))


class TakesPackedMatmul(Protocol):
    """A part whose matmul a packed one can replace: a layer, or a stack of matrices, which has a list of them."""

    packed_matmul: Any


@dataclass(frozen=True)
class PackedMatmuls:
    """Matmuls from the same codes that replace a model's own for a time: of layers, of each matrix of a stack; and weights
    that were dequantised once."""

    products: Mapping[QuantisedLinear, Product]
    stacks: Mapping[Any, Sequence[Product]] = field(default_factory=dict)
    weights: Mapping[QuantisedLinear, Tensor] = field(default_factory=dict)


@contextmanager
def using_packed_matmuls(matmuls: PackedMatmuls) -> Iterator[None]:
    """Replace the matmuls of these parts within the context, for example by those of a kernel that packed the codes."""
    parts: list[tuple[TakesPackedMatmul, Any]] = [*matmuls.products.items(), *matmuls.stacks.items()]
    # past the modules' own setting of attributes, which would take a fifth of a small model's step
    for part, product in parts:
        vars(part)["packed_matmul"] = product
    for layer, weight in matmuls.weights.items():
        vars(layer)["dequantised_weight"] = weight
    try:
        yield
    finally:
        for part, _ in parts:
            vars(part)["packed_matmul"] = None
        for layer in matmuls.weights:
            vars(layer)["dequantised_weight"] = None


class QuantisedEmbedding(QuantisedLinear):
    """A table of rows of codes, which is also the head's matrix where the two are tied."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows of the tokens, (…, K), in the model's type. `product` is the head's."""
        rows = self.stored[tokens] if self._keeper is None else self._keeper(tokens)
        return rows.dequantised().to(self.dtype)


def quantise_rows(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (…, K) as int8 and the float32 scale of each row, (…, 1): the largest of a row becomes ±127.5."""
    wide = hidden.to(torch.float32)
    scales = wide.abs().amax(-1, keepdim=True) / _HALF_RANGE_INT8
    codes = (wide / scales.where(scales > 0, 1)).round().clamp(-LARGEST_INT8 - 1, LARGEST_INT8)
    return codes.to(torch.int8), scales


def int8_product(hidden: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
    """A linear layer whose two sides are int8, one scale a row: sums are exact integers, scaled at the end."""
    codes, scales = quantise_rows(hidden)
    sums = _integer_product(codes.flatten(0, -2), weight.codes).view(*hidden.shape[:-1], -1)
    product = sums.to(torch.float32) * scales * weight.scales[:, 0]
    return (product if bias is None else product + bias).to(hidden.dtype)


def _integer_product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """Exact sums of products of int8 matrices, (M, N): whole numbers, in int32 or float64."""
    device = left_MK.device
    if device.type == "cpu":
        return torch._int_mm(left_MK, right_NK.T)
    # elsewhere `_int_mm` asks for certain sizes; in float64 every sum below 2^53 is exact too
    wide = widest_float(device)
    if wide == torch.float64:
        return left_MK.to(wide) @ right_NK.T.to(wide)
    sums_MN = torch.zeros(len(left_MK), len(right_NK), dtype=torch.int32, device=device)
    for left, right in zip(left_MK.split(_EXACT_IN_FLOAT32, 1), right_NK.split(_EXACT_IN_FLOAT32, 1), strict=True):
        sums_MN += (left.to(wide) @ right.T.to(wide)).to(torch.int32)
    return sums_MN


def quantised_parts(module: nn.Module) -> dict[str, QuantisedWeight]:
    """Every quantised weight of a model by its name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedWeight)}


def restore_codes(module: nn.Module) -> None:
    """Let every quantised weight of a model hold its codes again."""
    for part in module.modules():
        if isinstance(part, QuantisedWeight):
            part.restore()


def is_quantised(module: nn.Module) -> bool:
    """Whether any weight of a model is kept as codes."""
    return any(isinstance(part, QuantisedWeight) for part in module.modules())


def described(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain values."""
    return {name: getattr(scheme, name) for name in scheme.__dataclass_fields__}
