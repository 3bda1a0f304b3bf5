"""Collectives that gradients pass through, over one axis of the mesh.

A tensor on the ranks of an axis is *split* (each has its share along a dimension), *partial* (each has a summand), or *whole*
(all have the same). The gradient of a split tensor is split in the same way. That of a whole one is whole, where all
ranks go on with the same computation, or partial, where each goes on with a part of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

#: PyTorch 2.13 has new names for them.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(split: Tensor, axis: DeviceMesh, dim: int, *, gradient: Literal["whole", "partial"]) -> Tensor:
    """A whole tensor of what is split along `dim`; an all-gather.

    gradient: what that of the result will be. Backward, a partial one is summed and split (a reduce-scatter); of a whole one
    each rank takes its share.
    """
    result: Tensor = _Gather.apply(split, axis, dim % split.ndim, gradient == "partial")
    return result


def reduce_scatter(partial: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    """The sum of a partial tensor, split along `dim`, which the axis must divide. Backward an all-gather."""
    result: Tensor = _ReduceScatter.apply(partial, axis, dim % partial.ndim)
    return result


def all_reduce(partial: Tensor, axis: DeviceMesh) -> Tensor:
    """The sum of a partial tensor, whole, of which each rank goes on with a part. Backward the same again."""
    result: Tensor = _AllReduce.apply(partial, axis)
    return result


def share_out(whole: Tensor, axis: DeviceMesh) -> Tensor:
    """A whole tensor as it is, before a computation of which each rank does a part. Backward, an all-reduce makes the
    gradient whole again (`f` of Shoeybi et al. 2019, section 3)."""
    result: Tensor = _ShareOut.apply(whole, axis)
    return result


def exchange(rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
    """Rows sent to the ranks of an axis and those received from them, in the order of ranks, so many of each; an all-to-all.
    Backward, each row's gradient goes the way back."""
    result: Tensor = _Exchange.apply(rows, axis, sent, received)
    return result


def in_product_type(hidden: Tensor) -> Tensor:
    """A tensor in the type that products have where autocast is on: fewer bytes to send, and what they would read anyway."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


class _Gather(torch.autograd.Function):
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


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, whole: Tensor, axis: DeviceMesh) -> Tensor:
        context.axis = axis
        return whole.view_as(whole)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, context.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
        context.axis, context.sent, context.received = axis, sent, received
        return _exchanged(rows, axis, sent, received)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, context.axis, context.received, context.sent), None, None, None


def _exchanged(rows: Tensor, axis: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=axis.get_group())
    return came


def _gathered(split: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    first, *others = split.shape
    pieces = split.new_empty(axis.size() * first, *others)
    _ALL_GATHER(pieces, split.contiguous(), axis.get_group())
    return pieces if dim == 0 else torch.cat(pieces.chunk(axis.size()), dim)


def _summed_and_split(partial: Tensor, axis: DeviceMesh, dim: int) -> Tensor:
    assert partial.shape[dim] % axis.size() == 0, (tuple(partial.shape), dim, axis.size())
    pieces = partial.contiguous() if dim == 0 else torch.cat(partial.chunk(axis.size(), dim))
    first, *others = pieces.shape
    own = pieces.new_empty(first // axis.size(), *others)
    _REDUCE_SCATTER(own, pieces, group=axis.get_group())
    return own


def _summed(partial: Tensor, axis: DeviceMesh) -> Tensor:
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.get_group())
    return total
