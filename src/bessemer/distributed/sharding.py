"""Data parallelism: FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3), hybrid, and plain replication, which is FSDP
with a shard group of one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.stages import Stage
from bessemer.model.decoder import Decoder
from bessemer.model.experts import Experts

#: Names of the matrices of a linear layer and of experts, whose biases are added to products and not cast.
_MATRICES = frozenset({"weight", "gate_up_proj", "down_proj"})


def apply_fsdp(model: Decoder, mesh: Mesh, *, dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Shard a model's parameters over the mesh, in place, block by block, the rest as one more unit.

    Each block's weights are gathered before it runs, and its gradients reduce-scattered after its backward pass. Gradients are
    sums over ranks, not means: the loss is weighted by its fraction of the step's targets. Parameters become DTensors; names
    stay. Under expert parallelism experts are sharded over the ranks that have the same ones. offload: shards and optimizer
    states are kept in host memory.

    dtype: that of autocast, in which the matrices of the blocks are then gathered, as products read them; their gradients are
    summed in float32. Everything else (norms, biases, routers, embedding, head) is gathered as it is stored, with the rest of
    the model: so no number changes. None: the matrices too.

    A pipeline stage gathers its weights once a step and reduces its gradients once, when its schedule says so.
    """
    is_stage = isinstance(model, Stage)
    policy: OffloadPolicy = CPUOffloadPolicy() if offload and torch.cuda.is_available() else OffloadPolicy()
    placement = _placement(model, mesh) if mesh.layout.expert > 1 else None
    shard = partial(
        fully_shard,
        mesh=mesh.data,
        offload_policy=policy,
        reshard_after_forward=False if is_stage else None,
        shard_placement_fn=placement,
    )
    if dtype is None:
        for unit in (*model.blocks, model):
            shard(unit)
    else:
        matrices = set(product_matrices(model))
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # the model first, so that it takes what blocks have besides their matrices
        shard(model, ignored_params=matrices)
        for block in model.blocks:
            shard(block, mp_policy=precision, ignored_params=set(block.parameters()) - matrices)
    for unit in (*model.blocks, model):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # gloo has no other reduction
        unit.set_force_sum_reduction_for_comms(True)
    # training calls these, not `forward`: FSDP must hook them to gather parameters outside the blocks
    for method in () if is_stage else ("hidden", "hidden_and_mtp"):
        register_fsdp_forward_method(model, method)


def product_matrices(model: Decoder) -> list[nn.Parameter]:
    """The parameters of a decoder's blocks that only matrix products read, so that autocast casts them before any use."""
    modules = [module for block in model.blocks for module in block.modules() if isinstance(module, (nn.Linear, Experts))]
    named = [each for module in modules for each in module.named_parameters(recurse=False)]
    return [parameter for name, parameter in named if name in _MATRICES and parameter.is_floating_point()]


def _placement(model: Decoder, mesh: Mesh) -> Callable[[nn.Parameter], Any]:
    """`shard_placement_fn` of FSDP: mesh and dimension of the experts' parameters; None for the default."""
    try:
        # documented by `fully_shard`, and importable only from here
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
        held = parameter.shape[0] // mesh.layout.expert_ranks
        return ShardPlacementResult(Shard(0 if held % ranks == 0 else 1), axes)

    return place


def release_gathered(model: nn.Module) -> None:
    """Reshard parameters that a forward pass without a backward pass has gathered; does nothing without FSDP."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
