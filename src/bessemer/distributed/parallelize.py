"""Parallelism applied to a single-device model from outside: the model's code is unaware of it, and parameter names stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.context import apply_context_parallel
from bessemer.distributed.expert import apply_expert_parallel, apply_expert_parallel_for_inference
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import apply_fsdp
from bessemer.distributed.stages import Stage, split_into_stages
from bessemer.distributed.tensor import apply_tensor_parallel, logits_on_rank_0, pad_vocabulary
from bessemer.model.decoder import Decoder


class Parallelized(NamedTuple):
    """The model that a rank trains, and its pipeline stages in order; empty without a pipeline."""

    model: Decoder
    stages: list[Stage]


def parallelize(
    model: Decoder,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    blocks: Callable[[Decoder], None] = lambda part: None,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Parallelized:
    """Parallelise a model over a mesh, in place.

    blocks: applied to the blocks before FSDP and context parallelism: activation checkpointing, compilation. dtype and offload:
    as for `apply_fsdp`.
    """
    stages: list[Stage] = []
    if mesh.layout.pipeline > 1:
        stages = split_into_stages(model, mesh.layout, mesh.place.pipeline, in_a_v=config.pipeline_schedule == "zbv")
    parts: Sequence[Decoder] = stages or [model]
    if mesh.layout.tensor > 1:
        for part in parts:
            apply_tensor_parallel(part, mesh)
    if mesh.layout.expert > 1:
        for part in parts:
            apply_expert_parallel(part, mesh)
    blocks(model)
    if mesh.layout.context > 1:
        for part in parts:
            apply_context_parallel(part, mesh, config.context_method)
    if not mesh.alone and (mesh.layout.stage_ranks > 1 or offload):
        for part in parts:
            apply_fsdp(part, mesh, dtype=dtype, offload=offload)
    return Parallelized(model, stages)


def parallelize_for_inference(model: Decoder, mesh: Mesh) -> None:
    """Shard a model over the tensor and expert axes, in place, for inference on a batch that every rank has whole.

    Attention computes this rank's heads, the same on all ranks of the expert axis, and outputs are all-reduced. `logits`
    returns logits on rank 0 and an empty tensor elsewhere.
    """
    if mesh.layout.tensor > 1:
        pad_vocabulary(model, mesh.layout.tensor)
        apply_tensor_parallel(model, mesh, whole=True)
    if mesh.layout.expert > 1:
        apply_expert_parallel_for_inference(model, mesh)
    logits_on_rank_0(model, mesh)
