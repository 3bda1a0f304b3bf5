"""Low-rank adapters (LoRA, DoRA): added to the outputs of a model's linear layers, row by row; the weights stay as they are.

    y = W x + s · B (A x)                               LoRA
    y = g ⊙ (W x + s · B (A x)),  g = m / ‖W + s · B A‖     DoRA; norms of rows

A has a few rows and B a few columns (Hu et al. 2021, LoRA), so that many adapters fit beside one model. DoRA (Liu et al. 2024)
learns the magnitude m of each row of the changed weight beside its direction. In a batch each row has the adapter of its own
text, or none: W meets all rows at once, and each adapter's A and B meet its rows (Chen et al. 2023, Punica; Sheng et al. 2023,
S-LoRA). `folder` reads and writes them, `trained` holds those that are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Name of an adapter in training among the children of its linear layer.
CHILD = "adapter"

# Shapes: N outputs, K inputs, R rank, M rows.


class Update(NamedTuple):
    """What is added to one weight (N, K): scale · up · down. magnitude_N: the norms that the rows of the sum are then given
    (DoRA); None: those that they have."""

    down_RK: Tensor
    up_NR: Tensor
    scale: float
    magnitude_N: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Update:
        """The same with every tensor changed."""
        magnitude_N = None if self.magnitude_N is None else change(self.magnitude_N)
        return Update(change(self.down_RK), change(self.up_NR), self.scale, magnitude_N)

    @property
    def tensors(self) -> list[Tensor]:
        """Its numbers."""
        return [self.down_RK, self.up_NR, *([] if self.magnitude_N is None else [self.magnitude_N])]

    @torch.no_grad()
    def on(self, weight_NK: Tensor) -> Tensor:
        """The weight with the update in it, where and in the type it is; computed in float32 at least."""
        wide = torch.promote_types(weight_NK.dtype, torch.float32)
        sum_NK, gain_N = self._sum_and_gain(weight_NK, wide)
        return (sum_NK if gain_N is None else gain_N[:, None] * sum_NK).to(weight_NK.dtype)

    @torch.no_grad()
    def gain(self, weight_NK: Tensor) -> Tensor:
        """What an update with magnitudes multiplies the outputs of its layer by: m / ‖W + s B A‖, (N,), in m's type."""
        assert self.magnitude_N is not None
        _, gain_N = self._sum_and_gain(weight_NK, torch.promote_types(weight_NK.dtype, torch.float32))
        assert gain_N is not None
        return gain_N.to(self.magnitude_N.dtype)

    def _sum_and_gain(self, weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        own = self.each(lambda tensor: tensor.to(weight_NK.device, dtype))
        sum_NK = weight_NK.to(dtype) + own.scale * own.up_NR @ own.down_RK
        return sum_NK, None if own.magnitude_N is None else own.magnitude_N / row_norms(sum_NK)


def weight_of(model: nn.Module, layer: str = "") -> Tensor:
    """The weight of a linear layer, (N, K), dequantised where it is codes, without gradients."""
    weight_NK = model.get_submodule(layer).weight
    assert isinstance(weight_NK, Tensor)
    return weight_NK.detach()


def is_of_adapter(name: str) -> bool:
    """Whether a tensor of a model is one of an adapter in training, by its name."""
    return f".{CHILD}." in name


def row_norms(weight_NK: Tensor) -> Tensor:
    """The norm of each row, (N,); a row of zeros has the least positive number, so that it may be divided by."""
    return torch.linalg.vector_norm(weight_NK, dim=1).clamp(min=torch.finfo(weight_NK.dtype).tiny)


@dataclass(frozen=True, eq=False)
class Adapter:
    """The updates of some linear layers of a decoder, by the names of their modules. gains: of those with magnitudes, for one
    decoder's weights (`fitted`). whole: tensors that take the place of the decoder's, by their names (modules trained whole);
    they are for one model alone, and an engine takes them merged."""

    updates: Mapping[str, Update]
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same elsewhere, or in another type."""
        updates = {name: update.each(lambda tensor: tensor.to(device, dtype)) for name, update in self.updates.items()}
        gains, whole = (
            {name: tensor.to(device, dtype) for name, tensor in given.items()} for given in (self.gains, self.whole)
        )
        return Adapter(updates, gains, whole)

    def fitted(self, model: nn.Module) -> Adapter:
        """The same for `adapted`, with the gains of its magnitudes over a model's weights, whole and not sharded. After those
        change, `refit` is due. Without magnitudes it is itself."""
        gains = {
            name: update.gain(weight_of(model, name)) for name, update in self.updates.items() if update.magnitude_N is not None
        }
        return Adapter(self.updates, gains, self.whole) if gains else self

    def refit(self, model: nn.Module) -> None:
        """Compute the gains of a fitted adapter again, in place, over weights that have changed."""
        for name, gain_N in self.gains.items():
            gain_N.copy_(self.updates[name].gain(weight_of(model, name)))

    def put_whole(self, model: nn.Module) -> Adapter:
        """Put the tensors of modules trained whole into a model, in place; the adapter without them."""
        for name, tensor in self.whole.items():
            parameter = model.get_parameter(name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)
        return Adapter(self.updates, self.gains)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is DoRA's."""
        return any(update.magnitude_N is not None for update in self.updates.values())

    @property
    def nbytes(self) -> int:
        """Memory of its numbers."""
        return sum(tensor.nbytes for update in self.updates.values() for tensor in update.tensors) + sum(
            gain_N.nbytes for gain_N in self.gains.values()
        )


#: An adapter and the rows that it changes, as indices over all tokens of a batch; None: all rows.
AdaptedRows = tuple[Adapter, Tensor | None]
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], None]


class AdapterRows(NamedTuple):
    """An update of one layer with its gain, where it has magnitudes, and the rows that it changes."""

    update: Update
    gain_N: Tensor | None
    rows_M: Tensor | None


@contextmanager
def adapted(model: nn.Module, adapted_rows: Sequence[AdaptedRows]) -> Iterator[None]:
    """Within it, what `model` computes has the adapters' updates, each in its rows.

    Forward hooks do it, only within the context: the model's parameters, their names and packed copies are never touched. They
    run before other hooks: where a layer's inputs are sharded, its output is a summand then, and the
    adapter's part is summed over the ranks with it. An adapter with magnitudes is to be fitted to the model before.
    """
    for adapter, _ in adapted_rows:
        assert not adapter.whole, "Adapter.put_whole comes first"
        assert not adapter.has_magnitudes or adapter.gains, "Adapter.fitted comes first"
    names = dict.fromkeys(name for adapter, _ in adapted_rows for name in adapter.updates)
    handles = []
    try:
        for name in names:
            rows = [
                AdapterRows(adapter.updates[name], adapter.gains.get(name), rows_M)
                for adapter, rows_M in adapted_rows
                if name in adapter.updates
            ]
            for module, hook in _hooks(model, name, rows):
                handles.append(module.register_forward_hook(hook, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: nn.Module, name: str, rows: list[AdapterRows]) -> Iterator[tuple[nn.Module, Hook]]:
    """Where the updates of one linear layer go in."""

    def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        for each in rows:
            _add_update(inputs[0], out, each, module._parameters.get("bias"))

    yield model.get_submodule(name), add
    parent, _, child = name.rpartition(".")
    # attention may use the weight itself, without calling this module
    others = getattr(model.get_submodule(parent), "adapter_hooks", None)
    if others is not None:
        yield from others(child, rows)


def _add_update(hidden: Tensor, out: Tensor, adapter_rows: AdapterRows, bias_N: Tensor | None) -> None:
    """Add to a linear layer's output (…, N), in place: it is not shared yet.

    Autocast gives an output another type than the update has, and leaves products in place alone.
    """
    hidden_MK, out_MN = hidden.flatten(0, -2), out.view(-1, out.shape[-1])
    update, gain_N, rows_M = adapter_rows
    if gain_N is not None:
        rows = slice(None) if rows_M is None else rows_M
        sum_MN = (
            out_MN[rows] + functional.linear(functional.linear(hidden_MK[rows], update.down_RK), update.up_NR) * update.scale
        )
        sum_MN = sum_MN * gain_N if bias_N is None else (sum_MN - bias_N) * gain_N + bias_N
        out_MN[rows] = sum_MN.to(out.dtype)
    elif rows_M is None:
        narrow_MR = functional.linear(hidden_MK, update.down_RK).to(out.dtype)
        out_MN.addmm_(narrow_MR, update.up_NR.T.to(out.dtype), alpha=update.scale)
    else:
        added_MN = functional.linear(functional.linear(hidden_MK[rows_M], update.down_RK), update.up_NR)
        out_MN.index_add_(0, rows_M, added_MN.to(out.dtype), alpha=update.scale)
