"""Low-rank adapters of a sharded model: each update is sharded as the layer that it changes is.

    outputs sharded:  y_r = W_r x + s · B_r (A x)          inputs sharded:  y = Σ_r [W_r x_r + s · B (A_r x_r)]

So the rows of B follow those of W, or the columns of A do, and what the ranks add up is the layer's own sum: an adapter adds
no collective to a step. Layers that every rank has whole have their updates whole.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from bessemer.distributed.shards import as_dtensor, local, sharded_dim
from bessemer.model.adapter_folder import WeightSample, fingerprinted_tensors, rounded, sampled_places
from bessemer.model.adapters import Adapter, Update
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import tensor_shapes

# Shapes: N outputs, K inputs, R rank, P places of a tensor that are sampled.

#: Below every number of 16 bits: a place that no rank has filled.
_NOTHING = -(1 << 16)


class UpdateShape(NamedTuple):
    """The update of one layer of the unsharded model, without its numbers."""

    name: str
    rank: int
    outputs: int
    inputs: int
    scale: float


def shapes_of(adapter: Adapter) -> list[UpdateShape]:
    """An adapter's updates without their numbers."""
    return [
        UpdateShape(name, len(down_RK), up_NR.shape[0], down_RK.shape[1], scale)
        for name, (down_RK, up_NR, scale, _) in adapter.updates.items()
    ]


@torch.no_grad()
def exchange_adapter(
    model: Decoder, shapes: Sequence[UpdateShape], whole: Adapter | None = None, *, axis: DeviceMesh | None = None
) -> Adapter:
    """This rank's shard of an adapter. All ranks of the axis call it with the same shapes.

    whole: on the first rank, the adapter where the model lies and in its type. axis: None: all processes of the job.
    """
    updates, group = {}, _group_of(axis)
    for name, rank, outputs, inputs, scale in shapes:
        if whole is None:
            down_RK = torch.empty(rank, inputs, dtype=model.dtype, device=model.device)
            up_NR = torch.empty(outputs, rank, dtype=model.dtype, device=model.device)
        else:
            down_RK, up_NR, *_ = whole.updates[name]
            down_RK, up_NR = down_RK.contiguous(), up_NR.contiguous()
        for matrix in (down_RK, up_NR):
            # as bytes: of any type
            dist.broadcast(matrix.view(torch.uint8), group=group, group_src=0)
        updates[name] = _shard_of(model, name, Update(down_RK, up_NR, scale))
    return Adapter(updates)


def _group_of(axis: DeviceMesh | None) -> ProcessGroup | None:
    return None if axis is None else axis.get_group()


def _shard_of(model: Decoder, name: str, update: Update) -> Update:
    """The part of a layer's update that this rank's part of the layer computes."""
    weight = model.get_submodule(name)._parameters["weight"]
    assert weight is not None, name
    sharded, dim = as_dtensor(weight), sharded_dim(weight)
    if sharded is None or dim is None:
        return update
    rank, ranks = sharded.device_mesh.get_local_rank(), sharded.device_mesh.size()
    down_RK, up_NR, scale, _ = update
    # a copy: a view would keep the whole in memory
    if dim == 0:
        return Update(down_RK, up_NR.chunk(ranks)[rank].clone(), scale)
    return Update(down_RK.chunk(ranks, 1)[rank].clone(memory_format=torch.contiguous_format), up_NR, scale)


class AdapterNumbers:
    """Rank 0's numbers of adapters: commands name them by these, and the workers look up their shards."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Adapter, int] = weakref.WeakKeyDictionary()
        self._next = count()
        # filled by whichever thread drops an adapter last
        self._freed: deque[int] = deque()

    def next(self) -> int:
        """A number that no adapter had."""
        return next(self._next)

    def assign(self, number: int, adapter: Adapter) -> None:
        """Give an adapter its number, until it is gone."""
        self._numbers[adapter] = number
        weakref.finalize(adapter, self._freed.append, number)

    def of(self, adapter: Adapter) -> int:
        """The number of an adapter."""
        return self._numbers[adapter]

    def take_freed(self) -> list[int]:
        """The numbers of adapters that are gone since the last call: the workers may drop their shards."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


@torch.no_grad()
def gather_weight_samples(model: Decoder, axis: DeviceMesh | None = None) -> dict[str, WeightSample]:
    """The samples by which an adapter knows its base, of the unsharded model. All ranks of the axis call it.

    One all-reduce.
    """
    own = fingerprinted_tensors(model)
    shapes = {name: torch.Size(shape) for name, shape in tensor_shapes(model.config).items()}
    samples = torch.cat([_own_sample(tensor, shapes[name]) for name, tensor in own.items()], dim=1)
    dist.all_reduce(samples, dist.ReduceOp.MAX, group=_group_of(axis))
    numbers = samples.cpu().to(torch.int16).view(torch.bfloat16)
    lengths = [len(sampled_places(shapes[name].numel())) for name in own]
    parts = numbers.split(lengths, dim=1)
    return {name: WeightSample(tuple(shapes[name]), part) for name, part in zip(own, parts, strict=True)}


def _own_sample(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The sampled numbers that this rank's shard of a tensor holds, `rounded`, as the bits of bfloat16 in int32, (2, P);
    `_NOTHING` elsewhere.

    shape: of the whole tensor.
    """
    shard = local(tensor.detach())
    places = torch.tensor(sampled_places(shape.numel()), device=shard.device)
    held = torch.ones_like(places, dtype=torch.bool)
    sharded, dim = as_dtensor(tensor), sharded_dim(tensor)
    if sharded is not None and dim is not None:
        size = shard.shape[dim]
        inner = shape[dim + 1 :].numel()
        # a place as its index before, along and behind the sharded dimension
        before, along, behind = places // (inner * shape[dim]), places // inner % shape[dim], places % inner
        along = along - sharded.device_mesh.get_local_rank() * size
        held = (along >= 0) & (along < size)
        places = (before * size + along) * inner + behind
    numbers_2P = rounded(shard.flatten()[places[held]])
    found = torch.full((2, *places.shape), _NOTHING, dtype=torch.int32, device=shard.device)
    found[:, held] = numbers_2P.view(torch.int16).to(torch.int32)
    return found
