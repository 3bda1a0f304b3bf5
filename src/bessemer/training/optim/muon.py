"""Muon (Jordan et al. 2024): updates a matrix by its orthogonalised momentum.

The update of `torch.optim.Muon` to the bit, and besides: stacks of matrices (experts), each orthogonalised alone, and sharded
matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from bessemer.distributed.gradients import redistributed

#: The quintic iteration of Jordan et al. 2024, chosen for its slope at zero: it maps singular values in 0 … 1 to about
#: 0.7 … 1.2 in five steps.
_COEFFICIENTS, _ITERATIONS, _SMALLEST_NORM = (3.4445, -4.7750, 2.0315), 5, 1e-7
#: Root mean square of an update over the learning rate, as of AdamW (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximately U Vᵀ of each matrix U S Vᵀ, by Newton–Schulz iteration; (rows, columns) or (stack, rows, columns).

    Computed and returned in bfloat16; in float64 for float64 matrices, for comparisons between layouts.
    """
    a, b, c = _COEFFICIENTS
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.ndim == 2:
        x = x / x.norm().clamp(min=_SMALLEST_NORM)
    else:
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """W ← W (1 − ηλ) − 0.2 η √max(rows, columns) O, with O the orthogonalised (Nesterov) momentum of the gradient.

    The factor makes an update as large as one of AdamW's (Liu et al. 2025, eq. 4), so one learning rate serves both. A group's
    `parts`: how many matrices are stacked along the rows of each of its matrices (gate and up projection); each is updated
    separately.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
    ) -> None:
        """params: matrices, or stacks of them; or groups of them. Raises ValueError for anything else."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "parts": 1}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"Muon updates matrices and stacks of them, not a tensor of shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average, momentum = state["momentum_buffer"], group["momentum"]
        average.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum) if group["nesterov"] else average
        rows, columns = parameter.shape[-2] // group["parts"], parameter.shape[-1]
        size = _ADAMW_RMS * math.sqrt(max(rows, columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_orthogonalised_parts(direction, group["parts"]), alpha=-group["lr"] * size)


def _orthogonalised_parts(direction: Tensor, parts: int) -> Tensor:
    """`orthogonalised` of every part of every matrix, sharded or not."""
    if isinstance(direction, DTensor):
        return _orthogonalised_shards(direction, parts)
    if parts == 1:
        return orthogonalised(direction)
    stack = direction.unflatten(-2, (parts, -1)).flatten(0, -3)
    return orthogonalised(stack).reshape(direction.shape)


def _orthogonalised_shards(direction: DTensor, parts: int) -> DTensor:
    """The same of a sharded matrix: each rank gathers the whole matrices that it has a shard of, and keeps its shard.

    A stack that is sharded between matrices is not gathered. As many bytes are gathered as by FSDP for a forward pass, and
    every rank of a group computes the same matmuls: simple, and exact on every layout.
    """
    # dimensions before those of a matrix
    stacked = direction.ndim - 2
    whole = [p if getattr(p, "dim", stacked) < stacked else Replicate() for p in direction.placements]
    gathered = redistributed(direction, whole)
    update = DTensor.from_local(
        _orthogonalised_parts(gathered.to_local(), parts).contiguous(),
        direction.device_mesh,
        whole,
        run_check=False,
        shape=direction.shape,
        stride=direction.stride(),
    )
    return update.redistribute(placements=direction.placements)
