"""Sharded parameters: FSDP2 over the data axes, and parameters of an axis in modules that compute with plain tensors.

Data parallelism is FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3), hybrid, or plain replication, which is FSDP
with a shard group of one rank.

A parameter sharded over another axis is a DTensor under its old name to FSDP, optimizers and checkpoints. The code of its
module sees this rank's shard while FSDP has it gathered: a subclass has a property of the parameter's name, the same class
for all modules of a kind, so that compiled code serves all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.stages import DecoderStage
from bessemer.model.decoder import Decoder
from bessemer.model.layers.feed_forward import Experts
from bessemer.model.vision.encoder import VisionLayer
from bessemer.model.vision.native import NativeLayer


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
        # copied, since a view would keep the whole tensor in memory
        local_shard = local_shard.chunk(axis.size(), dim)[axis.get_local_rank()].clone(memory_format=torch.contiguous_format)
    distributed = DTensor.from_local(local_shard, axis, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def use_rows(module: nn.Module, name: str, rows: Tensor) -> None:
    """Make a module see only some rows of a replicated parameter. rows: their indices, on any device."""
    parameter = module._parameters[name]
    assert parameter is not None
    # these indices need values even while the weights are on the meta device
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


#: Names of the matrices of a linear layer and of experts, whose biases are added to products and not cast.
_MATRICES = frozenset({"weight", "gate_up_proj", "down_proj"})


def apply_fsdp(model: Decoder, mesh: Mesh, *, dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Shard a model's parameters over the mesh, in place, block by block; embedding and head, where they are not tied, each by
    itself, and the rest as one more unit.

    An encoder of pictures is sharded layer by layer, too.

    Each block's weights are gathered before it runs, and its gradients reduce-scattered after its backward pass. Those of the
    last block stay gathered between its passes, which follow each other, and the head's from the last norm on. Gradients are
    sums over ranks, not means: the loss is weighted by its fraction of the step's targets. Parameters become DTensors; names
    stay. Under expert parallelism experts are sharded over the ranks that have the same ones. offload: shards and optimizer
    states are kept in host memory.

    dtype: that of autocast, in which the matrices of the blocks are then gathered, as products read them; their gradients are
    summed in float32. Everything else (norms, biases, routers, embedding, head) is gathered as it is stored, with the rest of
    the model: so no number changes. None: the matrices too.

    The units of a pipeline stage are its blocks and the rest: it gathers its weights once a step and reduces gradients once,
    when its schedule says so.
    """
    is_stage = isinstance(model, DecoderStage)
    policy: OffloadPolicy = CPUOffloadPolicy() if offload and torch.cuda.is_available() else OffloadPolicy()
    placement = _placement(model, mesh) if mesh.layout.expert > 1 else None
    shard = partial(
        fully_shard,
        mesh=mesh.data,
        offload_policy=policy,
        shard_placement_fn=placement,
    )

    def kept(block: nn.Module) -> bool | None:
        return False if is_stage else block is not model.blocks[-1]

    ends = [] if is_stage or model.config.tie_word_embeddings else [model.embed_tokens, model.head]
    for end in ends:
        shard(end, reshard_after_forward=False)
    encoder_layers = layers_of_vision(model)
    for layer in encoder_layers:
        shard(layer, reshard_after_forward=False if is_stage else None)
    if dtype is None:
        for block in model.blocks:
            shard(block, reshard_after_forward=kept(block))
        shard(model, reshard_after_forward=False if is_stage else None)
    else:
        matrices = set(product_matrices(model))
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # the model comes first, so that it holds the blocks' other parameters
        shard(model, ignored_params=matrices, reshard_after_forward=False if is_stage else None)
        for block in model.blocks:
            others = set(block.parameters()) - matrices
            shard(block, mp_policy=precision, ignored_params=others, reshard_after_forward=kept(block))
    for unit in (*ends, *encoder_layers, *model.blocks, model):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # gloo reduces only by sums
        unit.set_force_sum_reduction_for_comms(True)
    if ends:
        # the loss reads the head's matrix, and does not call the module
        model.norm.register_forward_pre_hook(_gathers(model.head))
    # training calls these, not `forward`: FSDP must hook them to gather parameters outside the blocks
    for method in () if is_stage else ("hidden", "hidden_and_mtp"):
        register_fsdp_forward_method(model, method)


def layers_of_vision(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder's encoder of pictures; none of one that reads texts."""
    vision = getattr(model, "vision", None)
    return [] if vision is None else [part for part in vision.modules() if isinstance(part, VisionLayer | NativeLayer)]


def _gathers(head: nn.Module) -> Callable[[nn.Module, Any], None]:
    """A hook that gathers the head's parameters before another module runs."""

    def gather(module: nn.Module, inputs: Any) -> None:
        assert isinstance(head, FSDPModule)
        head.unshard()

    return gather


def product_matrices(model: Decoder) -> list[nn.Parameter]:
    """The parameters of a decoder's blocks that only matrix products read, so that autocast casts them before any use."""
    modules = [module for block in model.blocks for module in block.modules() if isinstance(module, (nn.Linear, Experts))]
    named = [each for module in modules for each in module.named_parameters(recurse=False)]
    return [parameter for name, parameter in named if name in _MATRICES and parameter.is_floating_point()]


def _placement(model: Decoder, mesh: Mesh) -> Callable[[nn.Parameter], Any]:
    """`shard_placement_fn` of FSDP: mesh and dimension of the experts' parameters; None for the default."""
    try:
        # `fully_shard` documents this class, which only this module exports
        from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise ConfigError(
            "parallel: expert needs a PyTorch whose FSDP2 takes a mesh for each parameter, which this one does not: update it "
            f"({torch.__version__})"
        ) from None
    axes = HSDPMeshInfo(mesh.data_of_experts, shard_mesh_dim=1, replicate_mesh_dim=0)
    modules = [module for module in model.modules() if isinstance(module, Experts)]
    experts = {id(parameter) for module in modules for parameter in module.parameters()}
    ranks = mesh.layout.ranks_of_an_expert

    def place(parameter: nn.Parameter) -> Any:
        if id(parameter) not in experts:
            return None
        experts_here = parameter.shape[0] // mesh.layout.expert_ranks
        return ShardPlacementResult(Shard(0 if experts_here % ranks == 0 else 1), axes)

    return place


def release_gathered(model: nn.Module) -> None:
    """Reshard parameters that a forward pass without a backward pass has gathered; does nothing without FSDP."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
