"""Differentiable collectives over one axis of the mesh.

A tensor on the ranks of an axis is *split* (each rank has a shard along a dimension), *partial* (each has a summand), or
*whole* (replicated). The gradient of a split tensor is split alike. That of a whole one is whole, where all ranks continue
with the same computation, or partial, where each continues with a part of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

#: Named differently in PyTorch 2.13.
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
