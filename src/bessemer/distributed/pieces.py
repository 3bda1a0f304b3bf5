"""Parameters that lie in pieces on the ranks of an axis, and modules that go on computing with plain tensors.

To FSDP, optimizers and checkpoints such a parameter is a DTensor under its old name. To the code of its module it is this
rank's piece, while FSDP has it gathered: a subclass with a property of the parameter's name, the same class for all modules of
a kind, so that compiled code serves all layers.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def distribute(module: nn.Module, axis: DeviceMesh, **dims: int | None) -> None:
    """Lay parameters of a module out over an axis, and let the module see this rank's pieces.

    dims: by a parameter's name the dimension that is split, or None where every rank has it whole. The gradient of a whole
    one is partial: each rank reads it for its own tokens or heads. Names that the module has no parameter for are passed over.
    """
    for name, dim in dims.items():
        if module._parameters.get(name) is not None:
            split(module, axis, name, dim)
            _see(module, name, "piece")


def distribute_whole(module: nn.Module, axis: DeviceMesh) -> None:
    """`distribute` with all parameters of a module, and of those in it, whole on every rank."""
    for part in module.modules():
        distribute(part, axis, **dict.fromkeys(part._parameters))


def split(module: nn.Module, axis: DeviceMesh, name: str, dim: int | None) -> None:
    """Make a parameter a DTensor of an axis, split along a dimension or whole. All ranks hold the same before."""
    parameter = module._parameters[name]
    assert parameter is not None
    placement: Placement = Replicate() if dim is None else Shard(dim)
    piece = parameter.detach()
    if dim is not None:
        # a copy: a view would keep the whole in memory
        piece = piece.chunk(axis.size(), dim)[axis.get_local_rank()].clone(memory_format=torch.contiguous_format)
    distributed = DTensor.from_local(piece, axis, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def see_rows(module: nn.Module, name: str, rows: Tensor) -> None:
    """Let a module see only some rows of a parameter that is whole on every rank."""
    module.register_buffer("own_rows", rows, persistent=False)
    _see(module, name, "rows")


def hide(module: nn.Module, name: str) -> None:
    """Let a module see None for a parameter; `piece` gives it."""
    if name in module._parameters:
        _see(module, name, "nothing")


def piece(module: nn.Module, name: str) -> Tensor | None:
    """This rank's piece of a distributed parameter, differentiable; the parameter itself while FSDP has it cut further."""
    parameter = module._parameters[name]
    if parameter is None:
        return None
    assert isinstance(parameter, DTensor)
    if parameter.device_mesh.ndim > 1:
        return parameter
    whole = parameter.placements[0].is_replicate()
    return parameter.to_local(grad_placements=[Partial()] if whole else None)


def _see(module: nn.Module, name: str, view: Literal["piece", "rows", "nothing"]) -> None:
    kind: Any = type(module)
    module.__class__ = _class_that_sees(kind, name, view)


@functools.cache
def _class_that_sees(kind: Any, name: str, view: Literal["piece", "rows", "nothing"]) -> type[nn.Module]:
    def see(module: Any) -> Tensor | None:
        seen = piece(module, name)
        if view == "piece" or isinstance(seen, DTensor):
            return seen
        return seen[module.own_rows] if view == "rows" and seen is not None else None

    return type(kind.__name__, (kind,), {name: property(see)})
