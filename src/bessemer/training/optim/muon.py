"""Muon (Jordan et al. 2024): updates a matrix by its orthogonalised momentum.

The update of `torch.optim.Muon` to the bit, and besides: stacks of matrices (experts), each orthogonalised alone; sharded
matrices, each orthogonalised by one of the ranks that hold its shards; products in another dtype than bfloat16, which
processors without instructions for it multiply up to two hundred times slower than float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bessemer.distributed.mesh import local
from bessemer.distributed.whole_matrices import Sharded, Slices, WholeMatrices, of_parts
from bessemer.training.optim.registry import MUON_ITERATIONS, newton_schulz_flops

#: The quintic iteration of Jordan et al. 2024, chosen for its slope at zero: it maps singular values in 0 … 1 to about
#: 0.7 … 1.2 in five steps.
_COEFFICIENTS, _SMALLEST_NORM = (3.4445, -4.7750, 2.0315), 1e-7
#: Root mean square of an update over the learning rate, as of AdamW (Liu et al. 2025, section 2.2).
_ADAMW_RMS = 0.2


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately U Vᵀ of each matrix U S Vᵀ, by Newton–Schulz iteration; (rows, columns) or (stack, rows, columns).

    Computed and returned in `dtype`; in float64 for float64 matrices, for comparisons between layouts.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(_product_dtype(matrices, dtype))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.ndim == 2:
        x = x / x.norm().clamp(min=_SMALLEST_NORM)
    else:
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


#: Elements of a stack of matrices of one shape that are orthogonalised together. Products of small matrices take less time
#: than their calls; large ones gain nothing from a stack and need its memory.
_STACK_ELEMENTS = 1 << 20


def orthogonalised_together(
    directions: Sequence[Tensor], parts: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """`orthogonalised` of every part of many matrices and stacks of them, the small ones of one shape in one stack.

    A matrix and a transposed one have one shape here.
    """
    orthogonalise = partial(orthogonalised, dtype=dtype)
    results: list[Tensor | None] = [None] * len(directions)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (direction, count) in enumerate(zip(directions, parts, strict=True)):
        rows, columns = direction.shape[-2] // count, direction.shape[-1]
        if direction.numel() > _STACK_ELEMENTS:
            results[number] = of_parts(orthogonalise, direction, count)
        else:
            alike.setdefault((min(rows, columns), max(rows, columns), direction.dtype, direction.device), []).append(number)
    for (short, *_), numbers in alike.items():
        stacks = [directions[number].unflatten(-2, (parts[number], -1)).flatten(0, -3) for number in numbers]
        wide = [stack if stack.shape[-2] == short else stack.mT for stack in stacks]
        orthogonal = orthogonalise(torch.cat(wide)).split([len(stack) for stack in stacks])
        for number, stack, one in zip(numbers, stacks, orthogonal, strict=True):
            results[number] = (one if stack.shape[-2] == short else one.mT).reshape(directions[number].shape)
    return [result for result in results if result is not None]


def _product_dtype(matrices: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if matrices.dtype == torch.float64 else dtype


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
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """params: matrices, or stacks of them; or groups of them. dtype: of the products that orthogonalise. Raises ValueError
        for anything else."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "parts": 1}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"Muon updates matrices and stacks of them, not a tensor of shape {tuple(parameter.shape)}"
                    )

        self._matrices = WholeMatrices(newton_schulz_flops)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Ranks with shards of a matrix call this together."""
        assert closure is None
        sharded, whole = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._begin(parameter, parameter.grad, group)
                if isinstance(parameter, DTensor):
                    sharded.append(update.sharded(parameter, group["parts"], self._dtype))
                else:
                    whole.append((update, group["parts"]))
        directions = [update.read((...,)) for update, _ in whole]
        updates = orthogonalised_together(directions, [parts for _, parts in whole], self._dtype)
        for (update, _), orthogonal in zip(whole, updates, strict=True):
            update.write((...,), orthogonal)
        self._matrices.apply(partial(orthogonalised, dtype=self._dtype), sharded)

    def _begin(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> _Update:
        """Add a gradient to the momentum, decay the weights, and return what is left to do."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rows, columns = parameter.shape[-2] // group["parts"], parameter.shape[-1]
        size = _ADAMW_RMS * math.sqrt(max(rows, columns))
        momentum = group["momentum"] if group["nesterov"] else None
        return _Update(local(parameter), local(gradient), local(average), momentum, -group["lr"] * size)


class _Update(NamedTuple):
    """The update of one parameter: this rank's shards of weights, gradient and averaged gradient. momentum: Nesterov's; None
    without. factor: of the orthogonalised direction."""

    weights: Tensor
    gradient: Tensor
    average: Tensor
    momentum: float | None
    factor: float

    def read(self, part: Slices) -> Tensor:
        """The direction to be orthogonalised, of a part of the shard."""
        average = self.average[part]
        return average if self.momentum is None else self.gradient[part].lerp(average, self.momentum)

    def write(self, part: Slices, orthogonal: Tensor) -> None:
        """Add an orthogonalised direction to a part of the weights."""
        self.weights[part].add_(orthogonal, alpha=self.factor)

    def sharded(self, parameter: DTensor, parts: int, dtype: torch.dtype) -> Sharded:
        """The matrix for `WholeMatrices`. Directions are rounded before they are sent, which gives the same numbers as rounding
        later."""
        return Sharded(parameter, _product_dtype(parameter, dtype), parts, self.read, self.write)
