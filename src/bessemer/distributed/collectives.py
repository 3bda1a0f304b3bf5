"""Collectives over the mesh: differentiable ones over one axis; gradient norm and redistribution over all ranks.

A tensor on the ranks of an axis is *split* (each rank has a shard along a dimension), *partial* (each has a summand), or
*whole* (replicated). The gradient of a split tensor is split alike. That of a whole one is whole, where all ranks continue
with the same computation, or partial, where each continues with a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from bessemer.distributed.mesh import Mesh, local
from bessemer.model.device import in_float64, widest_float

#: PyTorch 2.13 has renamed this function.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(split: Tensor, axis: DeviceMesh, dim: int, *, gradient: Literal["whole", "partial"]) -> Tensor:
    """The whole of a tensor that is split along `dim`; an all-gather.

    gradient: the layout of the result's gradient. Backward, a partial one is reduce-scattered; of a whole one each rank takes
    its shard.
    """
    result: Tensor = _AllGather.apply(split, axis, dim % split.ndim, gradient == "partial")
    return result


def reduce_scatter(partial: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    """The sum of a partial tensor, split along `dim`, which the axis must divide. Backward an all-gather."""
    result: Tensor = _ReduceScatter.apply(partial, axis, dim % partial.ndim)
    return result


def all_reduce(partial: Tensor, axis: DeviceMesh) -> Tensor:
    """The sum of a partial tensor, whole, of which each rank uses a part. Backward an all-reduce too."""
    result: Tensor = _AllReduce.apply(partial, axis)
    return result


def copy_to_ranks(whole: Tensor, axis: DeviceMesh) -> Tensor:
    """A whole tensor, unchanged, before a computation of which each rank does a part. Backward an all-reduce (`f` of Shoeybi et
    al. 2019, section 3)."""
    result: Tensor = _CopyToRanks.apply(whole, axis)
    return result


def all_to_all(rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
    """An all-to-all of rows in the order of ranks, `sent` and `received` of them per rank. Backward, each row's gradient is
    sent back."""
    result: Tensor = _AllToAll.apply(rows, axis, sent, received)
    return result


def to_autocast_dtype(hidden: Tensor) -> Tensor:
    """A tensor in autocast's dtype, where autocast is on: fewer bytes to send, and the dtype in which matmuls read it
    anyway."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, split: Tensor, axis: DeviceMesh, dim: int, partial: bool) -> Tensor:
        context.axis, context.dim, context.partial = axis, dim, partial
        return _gathered(split, axis, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        axis, dim = context.axis, context.dim
        if context.partial:
            return _summed_and_split(gradient, axis, dim), None, None, None
        return gradient.chunk(axis.size(), dim)[axis.get_local_rank()], None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, partial: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
        context.axis, context.dim = axis, dim
        return _summed_and_split(partial, axis, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, context.axis, context.dim), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, partial: Tensor, axis: DeviceMesh) -> Tensor:
        context.axis = axis
        return _summed(partial, axis)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, context.axis), None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, whole: Tensor, axis: DeviceMesh) -> Tensor:
        context.axis = axis
        return whole.view_as(whole)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, context.axis), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
        context.axis, context.sent, context.received = axis, sent, received
        return _all_to_all(rows, axis, sent, received)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, context.axis, context.received, context.sent), None, None, None


def _all_to_all(rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
    received_rows = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(received_rows, rows.contiguous(), received, sent, group=axis.get_group())
    return received_rows


def _gathered(split: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    first, *others = split.shape
    gathered = split.new_empty(axis.size() * first, *others)
    _ALL_GATHER(gathered, split.contiguous(), axis.get_group())
    return gathered if dim == 0 else torch.cat(gathered.chunk(axis.size()), dim)


def _summed_and_split(partial: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    assert partial.shape[dim] % axis.size() == 0, (tuple(partial.shape), dim, axis.size())
    ordered = partial.contiguous() if dim == 0 else torch.cat(partial.chunk(axis.size(), dim))
    first, *others = ordered.shape
    own = ordered.new_empty(first // axis.size(), *others)
    _REDUCE_SCATTER(own, ordered, group=axis.get_group())
    return own


def _summed(partial: Tensor, axis: DeviceMesh) -> Tensor:
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.get_group())
    return total


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mesh: Mesh, *, scale: float = 1.0) -> Tensor:
    """Scale the gradients so that their total norm is at most `largest`; returns the norm before, which may be inf or NaN, a
    scalar on their device: the host does not wait for it.

    Correct for any mixture of axes and meshes: each rank's squares count divided by the number of ranks of its pipeline stage
    that hold the same shard. One all-reduce of one number. scale: the loss scale of float16, which is divided out.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if mesh.alone:
        norm = torch.nn.utils.get_total_norm(gradients)
    else:
        squares = [local_squares(gradient, mesh) for gradient in gradients]
        norm = mesh.sum(torch.stack(squares).sum() if squares else torch.zeros(())).sqrt()
    norm = norm / scale
    # as in torch's clip_grad_norm_: a factor of at most 1, always applied, so that no rank decides by itself
    factor = (largest / (norm + 1e-6)).clamp(max=1.0) / scale
    for gradient in gradients:
        shard = local(gradient)
        shard.mul_(factor.to(shard.device, shard.dtype))
    return norm


def redistributed(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """The tensor with other placements, redistributed one axis after the other, the outermost first.

    FSDP shards the shards of the tensor axis, so it must be undone first; for several axes at once PyTorch warns that it goes
    one by one.
    """
    current = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if current[axis] != placement:
            current[axis] = placement
            tensor = tensor.redistribute(placements=current)
    return tensor


def whole_tensors(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Unsharded tensors by name, on every process, those of the other pipeline stages included, which come to host memory.

    Every process calls this with its own. Without gradients; what is not sharded is shared.
    """
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in tensors.items()
    }
    if mesh.layout.pipeline == 1:
        return whole
    stages: list[dict[str, Tensor]] = [{} for _ in range(mesh.layout.world_size)]
    dist.all_gather_object(stages, {name: tensor.cpu() for name, tensor in whole.items()})
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def local_squares(tensor: Tensor, mesh: Mesh, less: Tensor | None = None) -> Tensor:
    """This rank's summand of a tensor's sum of squares over all ranks, float64: the squares of its shard over the number of
    ranks of its pipeline stage that hold the same shard. less: subtracted from the shard first.

    A device without float64 sums in float32, and the sum is returned on the CPU."""
    shard = local(tensor)
    shard = shard.to(widest_float(shard.device))
    if less is not None:
        shard = shard - less.to(shard.device)
    return in_float64(shard.square().sum()) / _copies(tensor, mesh)


def _copies(tensor: Tensor, mesh: Mesh) -> int:
    """Number of ranks of this pipeline stage that hold the same shard of a tensor."""
    shards = 1
    if isinstance(tensor, DTensor):
        sizes = tensor.device_mesh.shape
        for size, placement in zip(sizes, tensor.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size
    return mesh.layout.stage_ranks // shards
