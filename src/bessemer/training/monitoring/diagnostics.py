"""Diagnostics every few steps: norms of gradients, weights and updates by layer and role, outliers of the residual stream,
loss by source, memory.

They keep no state between steps and do not change what is learned. A step with diagnostics costs one more forward pass, without
gradients and uncompiled, and a copy of this process's weights in host memory.

Shapes: B rows of a batch, T tokens of a row, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bessemer.core.environment import peak_memory_bytes
from bessemer.distributed.collectives import local_squares
from bessemer.distributed.mesh import Mesh, local
from bessemer.model.device import widest_float
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.trainer import Trainer

#: Whether a step with this loss and this gradient norm is taken.
Accept = Callable[[float, float], bool]

#: Roles of a block's parameters by a part of their names; the first match counts.
_ROLES = (
    ("norm", "norms"),
    ("attn", "attention"),
    ("router", "router"),
    ("experts", "experts"),
    ("mlp", "feed_forward"),
)
#: Names of the parameters outside the blocks.
_OUTER = {
    "embed_tokens": "embedding",
    "embed_positions": "positions",
    "norm": "final_norm",
    "lm_head": "head",
    "score": "head",
}


def place_of(name: str) -> str:
    """A decoder parameter's layer and role: `layers.3/attention`, `embedding`."""
    block = re.match(r"((?:layers|mtp)\.\d+)\.(.*)", name)
    if block is None:
        return _OUTER.get(name.partition(".")[0], name)
    return f"{block[1]}/{next((role for part, role in _ROLES if part in block[2]), 'other')}"


class NoDiagnostics:
    """A step without diagnostics."""

    def wrap_accept(self, accept: Accept) -> Accept:
        return accept

    def metrics(self) -> dict[str, float]:
        return {}


class Diagnostics:
    """Diagnostics of every `diagnostics_every`-th step and the last one.

    Constructed from the whole model, before it is sharded, so that every process knows the places that others hold.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._places = list(dict.fromkeys(place_of(name) for name, _ in model.named_parameters()))
        self._layers = sorted({int(match[1]) for name, _ in model.named_modules() if (match := _LAYER.fullmatch(name))})

    def of_step(self, number: int, trainer: Trainer, batch: Batch) -> StepDiagnostics | NoDiagnostics:
        """Diagnostics of step `number`, counted from 1; runs the forward pass of this process's rows now.

        Every process calls this, and the methods of what it returns, alike.
        """
        every = self._config.diagnostics_every
        if not every or (number % every and number != self._config.steps):
            return NoDiagnostics()
        return StepDiagnostics(trainer, batch, self._places, self._layers, self._config.gradient_clip, self._mesh)


class StepDiagnostics:
    """Diagnostics of one step: before it, between its gradients and its update, and after it."""

    def __init__(
        self, trainer: Trainer, batch: Batch, places: list[str], layers: list[int], gradient_clip: float, mesh: Mesh
    ) -> None:
        self._model = trainer.model
        self._places = places
        self._gradient_clip = gradient_clip
        self._mesh = mesh
        self._before: dict[str, Tensor] = {}
        with trainer.runtime.evaluating(trainer.model), _moments(trainer.model, layers) as moments:
            losses = trainer.losses_by_source(batch)
        self._metrics = {f"loss/{source}": loss for source, loss in losses.items()}
        self._metrics |= _outliers(moments, layers, mesh)

    def wrap_accept(self, accept: Accept) -> Accept:
        """`accept` that also measures the gradients and, where the step is taken, copies the weights."""

        def measuring_accept(loss: float, norm: float) -> bool:
            taken = accept(loss, norm)
            clipped = min(1.0, self._gradient_clip / (norm + 1e-6))
            gradients = {name: parameter.grad for name, parameter in self._parameters() if parameter.grad is not None}
            norms = self._norms(gradients)
            self._metrics |= {f"gradient_norm/{place}": value / clipped for place, value in norms.items()}
            if taken:
                # on the CPU .cpu() returns the tensor itself, which would change with the weights
                self._before = {name: local(value).detach().cpu().clone() for name, value in self._parameters()}
            return taken

        return measuring_accept

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """All diagnostics by stable keys, the same on every process."""
        metrics = dict(self._metrics)
        if self._before:
            weights = self._norms(dict(self._parameters()))
            updates = self._norms(dict(self._parameters()), self._before)
            self._before = {}
            metrics |= {f"weight_norm/{place}": value for place, value in weights.items()}
            metrics |= {f"update_ratio/{place}": value / weights[place] for place, value in updates.items() if weights[place]}
        metrics = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        memory = _peak_memory(next(self._model.parameters()).device)
        return metrics | {"peak_memory_bytes": int(self._mesh.largest(torch.tensor(memory, dtype=torch.float64)))}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)

    def _norms(self, tensors: Mapping[str, Tensor], less: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """The norm of the tensors of each place, over all processes. less: this process's shards by the same names, which are
        subtracted first."""
        squares = torch.zeros(len(self._places), dtype=torch.float64)
        where = {place: index for index, place in enumerate(self._places)}
        present = torch.zeros_like(squares)
        for name, tensor in tensors.items():
            index = where[place_of(name)]
            squares[index] += local_squares(tensor, self._mesh, None if less is None else less[name]).cpu()
            present[index] = 1
        squares, present = self._mesh.sum(torch.stack((squares, present)))
        return {place: float(square) ** 0.5 for place, square, here in zip(self._places, squares, present, strict=True) if here}


_LAYER = re.compile(r"layers\.(\d+)")


@contextmanager
def _moments(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """While entered, accumulates Σx², Σx⁴, the count and the largest |x| of each local block's output, float64 (4,), by
    layer."""
    moments: dict[int, Tensor] = {}

    def accumulate(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, hidden_BTD: Tensor) -> None:
            hidden = local(hidden_BTD).float()
            squares = hidden.square()
            widest = widest_float(hidden.device)
            sums = (squares.sum(dtype=widest), squares.square().sum(dtype=widest))
            measured = torch.stack((*sums, hidden.abs().max().to(widest))).cpu().double()
            now = torch.cat((measured[:2], torch.tensor([hidden.numel()], dtype=torch.float64), measured[2:]))
            before = moments.get(layer, torch.zeros(4, dtype=torch.float64))
            moments[layer] = torch.cat((before[:3] + now[:3], torch.maximum(before[3:], now[3:])))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            match = _LAYER.fullmatch(name)
            if match is not None:
                stack.callback(module.register_forward_hook(accumulate(int(match[1]))).remove)
        yield moments


def _outliers(moments: Mapping[int, Tensor], layers: list[int], mesh: Mesh) -> dict[str, float]:
    """Outlier metrics of each layer's output: the largest |x| over the root mean square, and the kurtosis (Σx⁴ / n) / (Σx² /
    n)², which is 3 for normal numbers and grows as few channels outgrow the rest (both as in Bondarenko et al. 2023)."""
    nothing = torch.zeros(4, dtype=torch.float64)
    here = torch.stack([moments.get(layer, nothing) for layer in layers])
    sums, largest = mesh.sum(here[:, :3]), mesh.largest(here[:, 3])
    metrics = {}
    for layer, (squares, fourths, count), most in zip(layers, sums.tolist(), largest.tolist(), strict=True):
        if squares:
            metrics[f"activation_outlier/layers.{layer}"] = most / (squares / count) ** 0.5
            metrics[f"activation_kurtosis/layers.{layer}"] = fourths * count / squares**2
    return metrics


def _peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: tensors on a GPU, resident set size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes() or 0
