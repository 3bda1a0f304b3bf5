"""Norms (root mean square, Zhang and Sennrich 2019; LayerNorm, Ba et al. 2016), and the scales that can be folded into them.

A fold is a place of a block where activations can be scaled down and the weights that read them up, without a change of the
outputs: nothing between what makes the activations and the matrices mixes channels or is not linear
(`quantisation/awq.py` chooses the scales).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.architecture import Architecture, DecoderShape


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of 1, then each channel by its weight.

    Computed in the weight's type or better: under autocast a bfloat16 input is normed in float32.
    offset: the stored weight is the scale minus 1, as Gemma keeps it, so that weight decay pulls the scale to 1.
    multiplier: factor on what comes out.
    """

    def __init__(self, width: int, eps: float, offset: bool = False, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns the same shape, in the weight's type."""
        scale = self.weight + 1 if self.offset else self.weight
        normed = functional.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, scale, self.eps)
        return normed if self.multiplier == 1 else normed * self.multiplier


class LayerNorm(nn.Module):
    """Centres the last dimension and scales it to a variance of 1, then a weight and a bias per channel. multiplier: as of
    `RMSNorm`."""

    def __init__(self, width: int, eps: float, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns the same shape, in the weight's type."""
        normed = functional.layer_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps)
        return normed if self.multiplier == 1 else normed * self.multiplier


def make_norm(config: Architecture, width: int | None = None, multiplier: float = 1.0) -> nn.Module:
    """The norm that a config asks for, over the residual stream or another width. multiplier: as of `RMSNorm`."""
    width = width or config.hidden_size
    if config.norm_type == "layer":
        return LayerNorm(width, config.rms_norm_eps, multiplier)
    return RMSNorm(width, config.rms_norm_eps, config.norm_offset, multiplier)


def make_last_norm(config: DecoderShape) -> nn.Module:
    """The norm before the head. What logits are divided by is in it: so whatever reads it and multiplies by the head agrees."""
    return make_norm(config, multiplier=1.0 if config.num_scores else 1 / config.logits_scaling)


# Shapes: K channels of the activations as their readers take them, P channels as their makers give them.


@dataclass(frozen=True)
class Fold:
    """A place where scales move from activations into the matrices that read them.

    divide: divides the weights that make the activations by scales, (P,); returns the quotients that it reached, (P,).
    readers: names of the quantised matrices that read the activations. others: names of other modules that read them.
    spread: scales of the makers' channels for the readers' channels, (P,) to (K,), where several of these share one.
    gathered: the way back, (K,) to (P,), by means.
    """

    channels: int
    divide: Callable[[Tensor], Tensor]
    readers: tuple[str, ...]
    others: tuple[str, ...] = ()
    spread: Callable[[Tensor], Tensor] = field(default=lambda scales: scales)
    gathered: Callable[[Tensor], Tensor] = field(default=lambda values: values)

    def below(self, parent: str) -> Fold:
        """The same with every name prefixed by `parent`."""
        readers, others = (tuple(f"{parent}.{name}" for name in names) for names in (self.readers, self.others))
        return replace(self, readers=readers, others=others)


def after_norm(norm: nn.Module, readers: tuple[str, ...], others: tuple[str, ...] = ()) -> Iterator[Fold]:
    """Nothing where the norm is absent: the readers are then given the residual stream."""
    if isinstance(norm, (RMSNorm, LayerNorm)):
        yield Fold(norm.weight.shape[0], lambda scales: _divide_norm(norm, scales), readers, others)


def _divide_norm(norm: RMSNorm | LayerNorm, scales_K: Tensor) -> Tensor:
    """Divides a norm's scale. What it was divided by is measured afterwards: in bfloat16 the quotient is rounded."""
    offset = 1.0 if isinstance(norm, RMSNorm) and norm.offset else 0.0
    before = norm.weight.detach().to(torch.float32) + offset
    norm.weight.data = (before / scales_K - offset).to(norm.weight.dtype)
    after = norm.weight.detach().to(torch.float32) + offset
    divided = torch.where((after != 0) & (before != 0), before / after, 1.0)
    if isinstance(norm, LayerNorm):
        norm.bias.data = (norm.bias.detach().to(torch.float32) / divided).to(norm.bias.dtype)
    return divided


def divide_outputs(layer: nn.Linear, scales: Tensor) -> Tensor:
    """Divides a layer's outputs."""
    layer.weight.data = (layer.weight.data.to(torch.float32) / scales[:, None]).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data = (layer.bias.data.to(torch.float32) / scales).to(layer.bias.dtype)
    return scales
