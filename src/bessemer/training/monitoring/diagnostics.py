"""What is watched every so many steps: norms of gradients, weights and updates by layer and role, outliers of the residual
stream, the loss of each source, memory.

Nothing of it is kept between steps, and nothing changes what is learned. A watched step costs one more forward pass, without
gradients and uncompiled, and a copy of the weights that this process holds, in the host's memory.

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
from bessemer.distributed.gradients import local, local_squares
from bessemer.distributed.mesh import Mesh
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import Batch
from bessemer.training.train_step import TrainingStep

#: Decides whether a step with this loss and this gradient norm is taken.
Accept = Callable[[float, float], bool]

#: Roles of a block's parameters by a piece of their names; the first that is found counts.
_ROLES = (
    ("norm", "norms"),
    ("attn", "attention"),
    ("router", "router"),
    ("experts", "experts"),
    ("mlp", "feed_forward"),
)
#: Names of the parameters outside the blocks.
_OUTER = {"embed_tokens": "embedding", "embed_positions": "positions", "norm": "final_norm", "lm_head": "head"}


def place_of(name: str) -> str:
    """Where a decoder's parameter stands and what it does: `layers.3/attention`, `embedding`."""
    block = re.match(r"((?:layers|mtp)\.\d+)\.(.*)", name)
    if block is None:
        return _OUTER.get(name.partition(".")[0], name)
    return f"{block[1]}/{next((role for part, role in _ROLES if part in block[2]), 'other')}"


class Unwatched:
    """A step that nobody looks at."""

    def accepting(self, accept: Accept) -> Accept:
        """`accept` itself."""
        return accept

    def figures(self) -> dict[str, float]:
        """Nothing."""
        return {}


class Observation:
    """Looks at the steps that the settings name: every `observe_every`-th and the last one.

    Made from the whole model, before it is cut over a mesh, so that every process knows the places that others hold.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._places = list(dict.fromkeys(place_of(name) for name, _ in model.named_parameters()))
        self._layers = sorted({int(match[1]) for name, _ in model.named_modules() if (match := _LAYER.fullmatch(name))})

    def watch(self, number: int, step: TrainingStep, batch: Batch) -> Watch | Unwatched:
        """What looks at step `number`, counted from 1, with the rows of its batch that this process has; reads them through the
        model now. Every process calls this, and what it gives, alike."""
        every = self._config.observe_every
        if not every or (number % every and number != self._config.steps):
            return Unwatched()
        return Watch(step, batch, self._places, self._layers, self._config.gradient_clip, self._mesh)


class Watch:
    """A look at one step: before it, between its gradient and its move, and after it."""

    def __init__(
        self, step: TrainingStep, batch: Batch, places: list[str], layers: list[int], gradient_clip: float, mesh: Mesh
    ) -> None:
        self._model, self._places, self._gradient_clip, self._mesh = step.model, places, gradient_clip, mesh
        self._before: dict[str, Tensor] = {}
        with step.session.observing(step.model), _moments(step.model, layers) as moments:
            losses = step.losses_by_source(batch)
        self._figures = {f"loss/{source}": loss for source, loss in losses.items()}
        self._figures |= _outliers(moments, layers, mesh)

    def accepting(self, accept: Accept) -> Accept:
        """`accept`, looking at the gradients and, where the step is taken, remembering the weights."""

        def watched(loss: float, norm: float) -> bool:
            taken = accept(loss, norm)
            clipped = min(1.0, self._gradient_clip / (norm + 1e-6))
            gradients = {name: parameter.grad for name, parameter in self._parameters() if parameter.grad is not None}
            norms = self._norms(gradients)
            self._figures |= {f"gradient_norm/{place}": value / clipped for place, value in norms.items()}
            if taken:
                # .cpu() gives a tensor on the processor itself, which would move with the weights
                self._before = {name: local(value).detach().cpu().clone() for name, value in self._parameters()}
            return taken

        return watched

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Everything that was seen, by stable keys, the same on every process."""
        found = dict(self._figures)
        if self._before:
            weights = self._norms(dict(self._parameters()))
            updates = self._norms(dict(self._parameters()), self._before)
            self._before = {}
            found |= {f"weight_norm/{place}": value for place, value in weights.items()}
            found |= {f"update_ratio/{place}": value / weights[place] for place, value in updates.items() if weights[place]}
        found = {name: float(f"{value:.6g}") for name, value in found.items()}
        memory = _peak_memory(next(self._model.parameters()).device)
        return found | {"peak_memory_bytes": int(self._mesh.largest(torch.tensor(memory, dtype=torch.float64)))}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)

    def _norms(self, tensors: Mapping[str, Tensor], less: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """The norm of the tensors of each place, over all processes. less: by the same names, the pieces of this process that
        are taken off first."""
        squares = torch.zeros(len(self._places), dtype=torch.float64)
        where = {place: index for index, place in enumerate(self._places)}
        seen = torch.zeros_like(squares)
        for name, tensor in tensors.items():
            index = where[place_of(name)]
            squares[index] += local_squares(tensor, self._mesh, None if less is None else less[name]).cpu()
            seen[index] = 1
        squares, seen = self._mesh.sum(torch.stack((squares, seen)))
        return {place: float(square) ** 0.5 for place, square, there in zip(self._places, squares, seen, strict=True) if there}


_LAYER = re.compile(r"layers\.(\d+)")


@contextmanager
def _moments(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """While entered, sums up what leaves each block that this process has: Σx², Σx⁴, how many numbers, and the largest |x|,
    float64 (4,), by layer."""
    found: dict[int, Tensor] = {}

    def look(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, hidden_BTD: Tensor) -> None:
            hidden = local(hidden_BTD).float()
            squares = hidden.square()
            sums = (squares.sum(dtype=torch.float64), squares.square().sum(dtype=torch.float64))
            count, largest = torch.tensor(hidden.numel(), dtype=torch.float64), hidden.abs().max().double()
            now = torch.stack([value.cpu() for value in (*sums, count, largest)])
            before = found.get(layer, torch.zeros(4, dtype=torch.float64))
            found[layer] = torch.cat((before[:3] + now[:3], torch.maximum(before[3:], now[3:])))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            match = _LAYER.fullmatch(name)
            if match is not None:
                stack.callback(module.register_forward_hook(look(int(match[1]))).remove)
        yield found


def _outliers(moments: Mapping[int, Tensor], layers: list[int], mesh: Mesh) -> dict[str, float]:
    """By layer, of what leaves it: the largest |x| over the root mean square, and the kurtosis Σx⁴ / n over (Σx² / n)², which
    is 3 for normal numbers and grows as few channels outgrow the rest (Bondarenko et al. 2023 follow both)."""
    nothing = torch.zeros(4, dtype=torch.float64)
    here = torch.stack([moments.get(layer, nothing) for layer in layers])
    sums, largest = mesh.sum(here[:, :3]), mesh.largest(here[:, 3])
    figures = {}
    for layer, (squares, fourths, count), most in zip(layers, sums.tolist(), largest.tolist(), strict=True):
        if squares:
            figures[f"activation_outlier/layers.{layer}"] = most / (squares / count) ** 0.5
            figures[f"activation_kurtosis/layers.{layer}"] = fourths * count / squares**2
    return figures


def _peak_memory(device: torch.device) -> int:
    """The most that this process held, in bytes: tensors on a GPU, the process's resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes() or 0
