"""Position encodings: rotary, with the ways to scale their frequencies, and sinusoidal.

Rotary positions (Su et al. 2021) turn a query and a key by angles proportional to their positions, so that their product
depends on the distance between them. Scaled frequencies let a model read further than it was trained. Sinusoidal encodings
(Vaswani et al. 2017, section 3.5) are added to the embedded tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from bessemer.model.architecture import RopeScaling


def rotary_frequencies(
    dim: int, theta: float, scaling: RopeScaling, max_position_embeddings: int, length: int | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels, (dim / 2,) float32, and the factor on cosines and sines.

    dim: channels that are turned. length: tokens read at once, which only `dynamic` looks at.
    Su et al. 2021, section 3.2.2; the scalings follow the functions below.
    """
    # float32 powers on the CPU, as transformers takes them: the table then has the same bits
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    context = scaling.original_max_position_embeddings or max_position_embeddings
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(dim, theta, scaling.factor, max_position_embeddings, length), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling, context), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, dim, theta, scaling, context), yarn_attention_factor(scaling)
    if scaling.rope_type == "longrope":
        return _longrope(frequencies, scaling, max_position_embeddings > context), scaling.attention_factor or 1.0
    return frequencies, 1.0


def _dynamic(dim: int, theta: float, factor: float, context: int, length: int | None) -> Tensor:
    """A larger base for texts longer than the context, so that the slowest pair turns no further than it was trained
    ("dynamic NTK"; Peng et al. 2023, appendix B.2)."""
    longest = max(length or context, context)
    base = theta * (factor * longest / context - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _llama3(frequencies: Tensor, scaling: RopeScaling, context: int) -> Tensor:
    """Slow pairs are slowed by the factor, fast ones left alone, those between blended (Llama 3.1's model card)."""
    # turns of each pair within the old context
    turns = context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # how much of each frequency stays
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _yarn(frequencies: Tensor, dim: int, theta: float, scaling: RopeScaling, context: int) -> Tensor:
    """As llama3, with a ramp that is linear in the channel (Peng et al. 2023, section 3.2)."""

    def channel_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel_that_turns(scaling.beta_fast), channel_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        # avoids a division by zero
        last += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _longrope(frequencies: Tensor, scaling: RopeScaling, is_long: bool) -> Tensor:
    """A divisor for each pair, found by search (Ding et al. 2024, arXiv 2402.13753), one set for contexts beyond the old one,
    one up to it. The model's context decides, for texts of any length, as in vLLM: `transformers` changes the set when a text
    grows past the old context, and what it has cached until then was turned by the other one."""
    factors = torch.tensor(scaling.long_factor if is_long else scaling.short_factor, dtype=torch.float32, device="cpu")
    if len(factors) != len(frequencies):
        raise ValueError(f"rope_type longrope has {len(factors)} factors for {len(frequencies)} frequencies")
    return frequencies / factors


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """The factor on cosines and sines that keeps the softmax as sharp as before (Peng et al. 2023, section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 m ln(factor) + 1; 1 where nothing is extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# Shapes: B batch, T time, P positions, C channels of a head, R channels that are turned.

#: Initial length of the table; longer texts extend it.
_FIRST_POSITIONS = 2048


class Rotation(NamedTuple):
    """Cosines and signed sines of a batch's positions; made once, used by every layer."""

    cosine: Tensor
    signed_sine: Tensor


class RotaryPositions(nn.Module):
    """A table of the rotations of positions 0, 1, 2, …, in float32 whatever the model's type. It grows with the texts that are
    read: of a context of 10M positions it would take 10 GB.

    positions: the model's context, which the scalings go by whatever the table's length.
    interleave: a pair is channels 2i and 2i + 1 (as Su et al. write it); else i and i + R/2.
    """

    cosines: Tensor
    signed_sines: Tensor

    def __init__(
        self, dim: int, theta: float, positions: int, scaling: RopeScaling | None = None, interleave: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.theta = theta
        self.positions = positions
        self.interleave = interleave
        self.scaling = scaling or RopeScaling()
        self._build(min(positions, _FIRST_POSITIONS), torch.device("cpu"))

    def _build(self, positions: int, device: torch.device) -> None:
        # a table that grew while sampling under inference mode must serve training too
        with torch.inference_mode(False):
            cosine_PR, signed_sine_PR = self._table(positions, None)
            self.register_buffer("cosines", cosine_PR.to(device), persistent=False)
            self.register_buffer("signed_sines", signed_sine_PR.to(device), persistent=False)

    def reserve(self, positions: int) -> None:
        """Extend the table to `positions` positions, at most the context. It never gets shorter."""
        if len(self.cosines) < (positions := min(positions, self.positions)):
            self._build(positions, self.cosines.device)

    def _table(self, positions: int, length: int | None) -> Rotation:
        return self.turns(torch.arange(positions, dtype=torch.float32, device="cpu"), length)

    def turns(self, positions: Tensor, length: int | None = None) -> Rotation:
        """Rotations at any float32 positions, computed and not looked up, (*positions, R)."""
        frequencies, factor = rotary_frequencies(self.dim, self.theta, self.scaling, self.positions, length)
        angles = positions[..., None] * frequencies.to(positions.device)
        cosine, sine = angles.cos() * factor, angles.sin() * factor
        # the first channel of a pair gets minus the sine
        if self.interleave:
            return Rotation(cosine.repeat_interleave(2, dim=-1), torch.stack((-sine, sine), dim=-1).flatten(-2))
        return Rotation(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` would round the table for good: follow the device and stay in float32
        super()._apply(fn, recurse)
        if self.cosines.dtype != torch.float32:
            self._build(len(self.cosines), self.cosines.device)
        return self

    def forward(self, positions_BT: Tensor | None, length: int, dtype: torch.dtype) -> Rotation:
        """Rotations at the given positions, (B, 1, T, R), or at 0 … length-1, (T, R), when None.

        length: tokens read so far; `reserve` first where a position lies beyond. Raises ValueError when they are more than the
        context: the model was made for no more. With `dynamic` scaling there is no such end: beyond the context the
        frequencies follow the length.
        """
        if length > self.positions and self.scaling.rope_type != "dynamic":
            raise ValueError(f"{length:,} tokens exceed the model's max_position_embeddings of {self.positions:,}")
        if length > len(self.cosines):
            self.reserve(max(length, 2 * len(self.cosines)))
        cosines, signed_sines = self.cosines, self.signed_sines
        if length > self.positions:
            cosines, signed_sines = (table.to(cosines.device) for table in self._table(length, length))
        if positions_BT is None:
            return Rotation(cosines[:length].to(dtype), signed_sines[:length].to(dtype))
        return Rotation(cosines[positions_BT].unsqueeze(1).to(dtype), signed_sines[positions_BT].unsqueeze(1).to(dtype))


def rotate(heads_BHTC: Tensor, rotation: Rotation, interleave: bool = False) -> Tensor:
    """Turns every pair of channels by its position's angle; channels beyond the table's stay. Same shape."""
    if has_torch_function_unary(heads_BHTC):
        # as PyTorch's own functions, for `model/batch_invariance.py`
        result: Tensor = handle_torch_function(rotate, (heads_BHTC,), heads_BHTC, rotation, interleave)
        return result
    return turned(heads_BHTC, rotation, interleave)


def turned(heads_BHTC: Tensor, rotation: Rotation, interleave: bool) -> Tensor:
    """The formula of `rotate`."""
    width = rotation.cosine.shape[-1]
    if width < heads_BHTC.shape[-1]:
        head_BHTR, rest = heads_BHTC[..., :width], heads_BHTC[..., width:]
        return torch.cat((turned(head_BHTR, rotation, interleave), rest), dim=-1)
    if interleave:
        partner_BHTC = heads_BHTC.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner_BHTC = heads_BHTC.roll(width // 2, dims=-1)
    return heads_BHTC * rotation.cosine + partner_BHTC * rotation.signed_sine


# Shapes: B batch, T time.


class SinusoidalPositions(nn.Module):
    """Sines and cosines of falling frequencies; nothing is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions_BT: Tensor) -> Tensor:
        """(B, T, width) float32."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions_BT.device) / self.width
        angles = positions_BT[..., None].float() / 10_000**exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width]
