"""Data parallelism: FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3), hybrid, and plain replication, which is
the same with nobody to shard with."""

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


def shard(model: Decoder, mesh: Mesh, *, offload: bool = False) -> None:
    """Shard a model's parameters over the mesh in place, block by block, the rest as one more unit.

    Each block's weights are gathered before it runs, and its gradients summed and scattered after its backward pass.
    Gradients are sums over ranks, not means: the loss is weighed by its share of the step's targets. Parameters become
    DTensors; names stay. Experts that an axis of their own shares are sharded over the ranks that have the same ones.
    offload: shards and optimizer states live in the host's memory.

    A stage of a pipeline gathers its weights once a step, and sums its gradients once: its schedule says when.
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
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    # training calls these, not `forward`: FSDP must see them to gather what belongs to no block
    for method in () if is_stage else ("hidden", "hidden_and_mtp"):
        register_fsdp_forward_method(model, method)


def _placement(model: Decoder, mesh: Mesh) -> Callable[[nn.Parameter], Any]:
    """Over which ranks, and along which dimension, a parameter is sharded; None for those that go as all do."""
    try:  # `fully_shard` documents them, and they have no other place
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
    """Give back what a forward pass without a backward one has gathered and kept, so that parameters are this rank's pieces
    again; nothing where no FSDP is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
