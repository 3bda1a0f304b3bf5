"""Adafactor (Shazeer and Stern 2018, algorithm 4), whose state for a matrix is a row and a column.

The update of `torch.optim.Adafactor`, also for sharded weights, which that one does not support: the means over rows and
columns are then reduced over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from bessemer.distributed.gradients import redistributed

#: Exponent of β₂ = 1 − t^−0.8 (section 7.2), and the smallest root mean square of a weight that updates are relative to.
_DECAY, _SMALLEST_WEIGHT = -0.8, 1e-3
#: Largest root mean square of an update before it is scaled by the learning rate (section 6).
_LARGEST_UPDATE = 1.0


class Adafactor(Optimizer):
    """W ← W (1 − ηλ) − ρ max(10⁻³, RMS(W)) U,  U = G / √V clipped to RMS 1,  ρ = min(η, 1 / √t).

    V is the mean of squared gradients; of a matrix only its means over rows and columns are kept, R and C, and
    V = R C / mean(R). Each matrix of a stack has its own R and C, and the stack one RMS of the update. The learning rate is
    relative to the size of the weights, so it is larger than AdamW's: about 0.01 to 0.3.
    """

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, eps = self.state[parameter], torch.finfo(parameter.dtype).eps
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        step, rate = float(state["step"]), group["lr"]
        new = step**_DECAY
        squares = gradient.square()
        if gradient.ndim > 1:
            rows, columns = _mean(squares, -1), _mean(squares, -2)
            if "row_var" not in state:
                state["row_var"], state["col_var"] = torch.zeros_like(rows), torch.zeros_like(columns)
            rows, columns = state["row_var"].lerp_(rows, new), state["col_var"].lerp_(columns, new)
            variance = _sharded_like(rows / _mean(rows, -2).clamp(min=eps) * columns, parameter)
        else:
            if "variance" not in state:
                state["variance"] = torch.zeros_like(squares)
            variance = state["variance"].lerp_(squares, new)
        update = gradient * variance.clamp(min=eps**2).rsqrt()
        size = _root_mean_square(parameter).clamp(min=_SMALLEST_WEIGHT) * min(rate, step**-0.5)
        size = size / (_root_mean_square(update) / _LARGEST_UPDATE).clamp(min=1.0)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(update * size)


def _mean(values: Tensor, dim: int) -> Tensor:
    """The mean along a dimension, kept with size 1; reduced over the ranks that shard it."""
    sums = values.sum(dim, keepdim=True)
    if isinstance(sums, DTensor):
        whole = [Replicate() if placement.is_partial() else placement for placement in sums.placements]
        sums = redistributed(sums, whole)
    return sums / values.shape[dim]


def _sharded_like(values: Tensor, other: Tensor) -> Tensor:
    """The same values, sharded as another tensor; no communication."""
    if isinstance(values, DTensor) and isinstance(other, DTensor):
        return values.redistribute(placements=other.placements)
    return values


def _root_mean_square(values: Tensor) -> Tensor:
    """The root mean square of all values, on every rank."""
    total = values.square().sum()
    if isinstance(total, DTensor):
        total = redistributed(total, [Replicate()] * total.device_mesh.ndim).to_local()
    return (total / values.numel()).sqrt()
