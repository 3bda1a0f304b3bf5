"""Low-rank adapters (LoRA): added to the outputs of a model's linear layers, row by row; the weights stay as they are.

    y = W x + s · B (A x)

A has a few rows and B a few columns (Hu et al. 2021, LoRA), so that many adapters fit beside one model. In a batch each row
has the adapter of its own text, or none: W meets all rows at once, and each adapter's A and B meet its rows (Chen et al.
2023, Punica; Sheng et al. 2023, S-LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.latent_attention import LatentAttention

# Shapes: N outputs, K inputs, R rank, M rows, B batch, H heads, T time, L latent, C channels of a head.


class Update(NamedTuple):
    """What is added to one weight (N, K): scale · up · down."""

    down_RK: Tensor
    up_NR: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """The updates of some linear layers of a decoder, by the names of their modules."""

    updates: Mapping[str, Update]

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same elsewhere, or in another type."""
        moved = {
            name: Update(down_RK.to(device, dtype), up_NR.to(device, dtype), scale)
            for name, (down_RK, up_NR, scale) in self.updates.items()
        }
        return Adapter(moved)

    @property
    def nbytes(self) -> int:
        """Memory of its numbers."""
        return sum(down_RK.nbytes + up_NR.nbytes for down_RK, up_NR, _ in self.updates.values())


#: An adapter and the rows that it changes, counted over all tokens of a batch; None: all of them.
AdaptedRows = tuple[Adapter, Tensor | None]
_Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], None]


@contextmanager
def adapted(model: nn.Module, adapted_rows: Sequence[AdaptedRows]) -> Iterator[None]:
    """Within it, what `model` computes has the adapters' updates, each in its rows.

    It is done by forward hooks, which are there only as long: the model's parameters, their names, and what is packed of them
    are never touched. They come before other hooks: where a layer's inputs are sharded, its output is a summand then, and the
    adapter's part is summed over the ranks with it.
    """
    names = dict.fromkeys(name for adapter, _ in adapted_rows for name in adapter.updates)
    handles = []
    try:
        for name in names:
            updates = [(adapter.updates[name], rows_M) for adapter, rows_M in adapted_rows if name in adapter.updates]
            for module, hook in _hooks(model, name, updates):
                handles.append(module.register_forward_hook(hook, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: nn.Module, name: str, updates: list[tuple[Update, Tensor | None]]) -> Iterator[tuple[nn.Module, _Hook]]:
    """Where the updates of one linear layer go in."""

    def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        for update, rows_M in updates:
            _add_update(inputs[0], out, update, rows_M)

    yield model.get_submodule(name), add
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, LatentAttention) and name.endswith(".kv_b_proj"):
        yield from _latent_hooks(parent, updates)


def _add_update(hidden: Tensor, out: Tensor, update: Update, rows_M: Tensor | None) -> None:
    """Add to a linear layer's output (…, N), in place: it is not shared yet."""
    hidden_MK, out_MN = hidden.flatten(0, -2), out.view(-1, out.shape[-1])
    if rows_M is None:
        out_MN.addmm_(functional.linear(hidden_MK, update.down_RK), update.up_NR.T, alpha=update.scale)
    else:
        added_MN = functional.linear(functional.linear(hidden_MK[rows_M], update.down_RK), update.up_NR)
        out_MN.index_add_(0, rows_M, added_MN, alpha=update.scale)


def _latent_hooks(attention: LatentAttention, updates: list[tuple[Update, Tensor | None]]) -> Iterator[tuple[nn.Module, _Hook]]:
    """`kv_b_proj` makes keys and values out of latents. With a cache its two halves are applied to queries, and to sums of
    latents, head by head; so are those of its updates."""
    halves = []
    for update, rows_M in updates:
        up_HCR = update.up_NR.unflatten(0, (attention.heads, -1))
        halves.append((update, up_HCR[:, : attention.unturned], up_HCR[:, attention.unturned :], rows_M))

    def into_latent(module: nn.Module, inputs: tuple[Tensor, Tensor], out_BHTL: Tensor) -> None:
        for update, keys_HCR, _, rows_M in halves:
            rows = slice(None) if rows_M is None else rows_M
            out_BHTL[:, :, rows] += (inputs[0][:, :, rows] @ keys_HCR) @ update.down_RK * update.scale

    def out_of_latent(module: nn.Module, inputs: tuple[Tensor, Tensor], out_BHTC: Tensor) -> None:
        for update, _, values_HCR, rows_M in halves:
            rows = slice(None) if rows_M is None else rows_M
            narrow_BHTR = functional.linear(inputs[0][:, :, rows], update.down_RK)
            out_BHTC[:, :, rows] += narrow_BHTR @ values_HCR.transpose(1, 2) * update.scale

    yield attention.into_latent, into_latent
    yield attention.out_of_latent, out_of_latent
