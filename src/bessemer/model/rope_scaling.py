"""The frequencies of rotary positions, and the ways to change them so that a model reads further than it was trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    return frequencies, 1.0


def _dynamic(dim: int, theta: float, factor: float, context: int, length: int | None) -> Tensor:
    """A larger base for texts longer than the context, so that the slowest pair turns no further than it was trained
    ("dynamic NTK"; Peng et al. 2023, appendix B.2)."""
    longest = max(length or context, context)
    base = theta * (factor * longest / context - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _llama3(frequencies: Tensor, scaling: RopeScaling, context: int) -> Tensor:
    """Slow pairs are slowed by the factor, fast ones left alone, those between blended (Llama 3.1's model card)."""
    # in the old context
    turns = context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # left alone
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
        # a ramp without length
        last += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


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
