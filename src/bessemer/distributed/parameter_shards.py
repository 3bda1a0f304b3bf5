"""Parameters sharded over an axis, in modules that compute with plain tensors.

To FSDP, optimizers and checkpoints such a parameter is a DTensor under its old name. To the code of its module it is this
rank's shard, while FSDP has it gathered: a subclass with a property of the parameter's name, the same class for all modules of
a kind, so that compiled code serves all layers.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def shard_parameters(module: nn.Module, axis: DeviceMesh, **dims: int | None) -> None:
    """Shard parameters of a module over an axis, in place, so that the module sees this rank's shards.

    dims: by parameter name the dimension that is split, or None to replicate it. The gradient of a replicated parameter is
    partial: each rank uses it for its own tokens or heads. Names without a parameter in the module are ignored.
    """
    for name, dim in dims.items():
        if module._parameters.get(name) is not None:
            shard_parameter(module, axis, name, dim)
            _set_view(module, name, "shard")


def replicate_parameters(module: nn.Module, axis: DeviceMesh) -> None:
    """Replicate all parameters of a module and its submodules over an axis."""
    for part in module.modules():
        shard_parameters(part, axis, **dict.fromkeys(part._parameters))


def shard_parameter(module: nn.Module, axis: DeviceMesh, name: str, dim: int | None) -> None:
    """Make a parameter a DTensor of an axis, split along a dimension or replicated. All ranks have the same values before."""
    parameter = module._parameters[name]
    assert parameter is not None
    placement: Placement = Replicate() if dim is None else Shard(dim)
    local_shard = parameter.detach()
    if dim is not None:
        # a copy: a view would keep the whole in memory
        local_shard = local_shard.chunk(axis.size(), dim)[axis.get_local_rank()].clone(memory_format=torch.contiguous_format)
    distributed = DTensor.from_local(local_shard, axis, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def use_rows(module: nn.Module, name: str, rows: Tensor) -> None:
    """Make a module see only some rows of a replicated parameter. rows: their indices, on any device."""
    parameter = module._parameters[name]
    assert parameter is not None
    # of a model on the meta device they have values before it has weights
    rows = rows if parameter.device.type == "meta" else rows.to(parameter.device)
    module.register_buffer("own_rows", rows, persistent=False)
    _set_view(module, name, "rows")


def hide_parameter(module: nn.Module, name: str) -> None:
    """Make a module see None for a parameter; `local_shard` returns it."""
    if name in module._parameters:
        _set_view(module, name, "nothing")


def local_shard(module: nn.Module, name: str) -> Tensor | None:
    """This rank's shard of a parameter, differentiable; the DTensor itself while FSDP has it sharded further."""
    parameter = module._parameters[name]
    if parameter is None:
        return None
    assert isinstance(parameter, DTensor)
    if parameter.device_mesh.ndim > 1:
        return parameter
    whole = parameter.placements[0].is_replicate()
    return parameter.to_local(grad_placements=[Partial()] if whole else None)


def _set_view(module: nn.Module, name: str, view: Literal["shard", "rows", "nothing"]) -> None:
    kind: Any = type(module)
    module.__class__ = _class_with_view(kind, name, view)


@functools.cache
def _class_with_view(kind: Any, name: str, view: Literal["shard", "rows", "nothing"]) -> type[nn.Module]:
    def see(module: Any) -> Tensor | None:
        seen = local_shard(module, name)
        if view == "shard" or isinstance(seen, DTensor):
            return seen
        return seen[module.own_rows] if view == "rows" and seen is not None else None

    return type(kind.__name__, (kind,), {name: property(see)})
