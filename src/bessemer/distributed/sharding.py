"""Data parallelism: FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3), hybrid, and plain replication, which is FSDP
with a shard group of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.stages import Stage
from bessemer.model.decoder import Decoder
from bessemer.model.experts import Experts


def apply_fsdp(model: Decoder, mesh: Mesh, *, offload: bool = False) -> None:
    """Shard a model's parameters over the mesh, in place, block by block, the rest as one more unit.

    Each block's weights are gathered before it runs, and its gradients reduce-scattered after its backward pass. Gradients are
    sums over ranks, not means: the loss is weighted by its fraction of the step's targets. Parameters become DTensors; names
    stay. Under expert parallelism experts are sharded over the ranks that have the same ones. offload: shards and optimizer
    states are kept in host memory.

    A pipeline stage gathers its weights once a step and reduces its gradients once, when its schedule says so.
    """
    is_stage = isinstance(model, Stage)
    policy: OffloadPolicy = CPUOffloadPolicy() if offload and torch.cuda.is_available() else OffloadPolicy()
    placement = _placement(model, mesh) if mesh.layout.expert > 1 else None
    for unit in (*model.blocks, model):
        fully_shard(
            unit,
            mesh=mesh.data,
            offload_policy=policy,
            reshard_after_forward=False if is_stage else None,
            shard_placement_fn=placement,
        )
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # gloo has no other reduction
        unit.set_force_sum_reduction_for_comms(True)
    # training calls these, not `forward`: FSDP must hook them to gather parameters outside the blocks
    for method in () if is_stage else ("hidden", "hidden_and_mtp"):
        register_fsdp_forward_method(model, method)


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
