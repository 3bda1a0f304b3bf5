"""Data parallelism: FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3), hybrid, and plain replication, which is
the same with nobody to shard with."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method

from bessemer.distributed.mesh import Mesh
from bessemer.distributed.stages import Stage
from bessemer.model.decoder import Decoder


def shard(model: Decoder, mesh: Mesh, *, offload: bool = False) -> None:
    """Shard a model's parameters over the mesh in place, block by block, the rest as one more unit.

    Each block's weights are gathered before it runs, and its gradients summed and scattered after its backward pass.
    Gradients are sums over ranks, not means: the loss is weighed by its share of the step's targets. Parameters become
    DTensors; names stay. offload: shards and optimizer states live in the host's memory.

    A stage of a pipeline gathers its weights once a step, and sums its gradients once: its schedule says when.
    """
    is_stage = isinstance(model, Stage)
    policy: OffloadPolicy = CPUOffloadPolicy() if offload and torch.cuda.is_available() else OffloadPolicy()
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=mesh.data, offload_policy=policy, reshard_after_forward=False if is_stage else None)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    # training calls these, not `forward`: FSDP must see them to gather what belongs to no block
    for method in () if is_stage else ("hidden", "hidden_ahead"):
        register_fsdp_forward_method(model, method)


def release_gathered(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one has gathered and kept, so that parameters are this rank's pieces
    again; nothing where no FSDP is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
