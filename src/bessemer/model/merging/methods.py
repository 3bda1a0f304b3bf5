"""Methods of merging, as functions of tensors: θ₀ the base, θᵢ the models, δᵢ = θᵢ - θ₀ their differences, wᵢ their weights.

    linear              Σ wᵢ θᵢ / Σ wᵢ                                       Wortsman et al. 2022
    SLERP               θ₁ sin((1-t)Ω)/sin Ω + θ₂ sin(tΩ)/sin Ω,  Ω the angle between them, flat      Shoemake 1985
    task arithmetic     θ₀ + λ Σ wᵢ δᵢ                                       Ilharco et al. 2023
    TIES                δᵢ trimmed to its largest entries; each entry keeps the sign of Σ wᵢ δᵢ, and of the models those
                        that have it: θ₀ + λ Σ' wᵢ δᵢ / Σ' wᵢ                Yadav et al. 2023
    DARE                each entry of δᵢ is dropped with probability 1 - p, the others divided by p; then summed, or elected
                        as in TIES                                           Yu et al. 2024

Computed in float32, float64 tensors in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

#: Above this cosine two tensors count as parallel and are interpolated linearly, since their arc has no direction.
_PARALLEL = 0.9995
#: Sums of magnitudes below which nothing is rescaled.
_NOTHING = 1e-7

Rescaling = Literal["density", "l1", "none"]


class DeltaOptions(NamedTuple):
    """How differences are merged. generator: of a difference's index, the random generator by which DARE drops its entries."""

    densities: Sequence[float]
    normalize: bool
    rescale: Rescaling
    factor: float
    generator: Callable[[int], torch.Generator]


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """The weighted mean, or without `normalize` the weighted sum, of tensors of one shape. Raises ValueError where the weights'
    sum is 0."""
    total = math.fsum(weights) if normalize else 1.0
    if abs(total) < 1e-8:
        raise ValueError("the weights add up to 0")
    merged = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        merged.add_(tensor, alpha=weight)
    return merged.div_(total)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at t of the arc from one tensor to another, each as one flat vector; of a straight line where they are nearly
    parallel or opposite. The norm goes from the first's to the second's."""
    norms = [float(torch.linalg.vector_norm(tensor)) or 1.0 for tensor in (first, second)]
    cosine = float((first.flatten() / norms[0]) @ (second.flatten() / norms[1]))
    if abs(cosine) > _PARALLEL:
        return first * (1 - t) + second * t
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return first * (math.sin((1 - t) * angle) / math.sin(angle)) + second * (math.sin(t * angle) / math.sin(angle))


def trim(delta: Tensor, density: float, rescale: Rescaling = "none") -> Tensor:
    """A difference with its largest entries by magnitude, a share `density` of them and at least one, the others 0."""
    if density >= 1:
        return delta
    if density <= 0 or not delta.numel():
        return torch.zeros_like(delta)
    kept = torch.topk(delta.abs().flatten(), max(1, int(density * delta.numel())), sorted=False).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[kept] = True
    return _rescaled(delta, delta * mask.view_as(delta), density, rescale)


def drop(delta: Tensor, density: float, generator: torch.Generator, rescale: Rescaling = "density") -> Tensor:
    """A difference with each entry kept with probability `density`, the others 0."""
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    return _rescaled(delta, delta * torch.bernoulli(torch.full_like(delta, density), generator=generator), density, rescale)


def _rescaled(before: Tensor, after: Tensor, density: float, rescale: Rescaling) -> Tensor:
    if rescale == "none":
        return after
    if rescale == "density":
        return after.div_(density)
    sums = [float(tensor.abs().sum()) for tensor in (before, after)]
    return after if min(sums) < _NOTHING else after.mul_(sums[0] / sums[1])


def merge_deltas(method: str, deltas: Sequence[Tensor], weights: Sequence[float], options: DeltaOptions) -> Tensor:
    """The merged difference of several, λ included.

    method: task_arithmetic, ties, dare_linear or dare_ties. A weight may be negative. Memory: that of two tensors for each
    difference.
    """
    prepared = []
    for index, (delta, density) in enumerate(zip(deltas, options.densities, strict=True)):
        if method == "ties":
            delta = trim(delta, density, options.rescale)
        elif method.startswith("dare"):
            delta = drop(delta, density, options.generator(index), options.rescale)
        prepared.append(delta * weights[index])
    if method in ("ties", "dare_ties"):
        merged, divisor = _elected(prepared, weights)
        divisor[divisor == 0] = 1
    else:
        merged = torch.stack(prepared).sum(0)
        total = math.fsum(weights)
        divisor = merged.new_tensor(1.0 if abs(total) < 1e-8 else total)
    if options.normalize:
        merged = merged / divisor
    return merged * options.factor


def _elected(weighted: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The sum of the entries that have the sign of the sum of all, and the sum of their weights."""
    is_positive = torch.stack(list(weighted)).sum(0) >= 0
    elected = torch.where(is_positive, 1.0, -1.0).to(weighted[0].dtype)
    merged, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for tensor, weight in zip(weighted, weights, strict=True):
        agrees = tensor.sign() == elected
        merged.add_(tensor * agrees)
        divisor.add_(agrees, alpha=weight)
    return merged, divisor
