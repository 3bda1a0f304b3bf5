"""A single-device model put on a mesh, from outside: the model's code knows nothing of it, and its names stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.context import share_rows
from bessemer.distributed.expert import share_experts, share_experts_of_all
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import shard
from bessemer.distributed.stages import Stage, split_into_stages
from bessemer.distributed.tensor import apply_tensor, fill_up_vocabulary, logits_on_the_first
from bessemer.model.decoder import Decoder


class Parallelized(NamedTuple):
    """What a rank trains, and the stages of a pipeline that it consists of, in order; none where there is no pipeline."""

    model: Decoder
    stages: list[Stage]


def parallelize(
    model: Decoder,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    blocks: Callable[[Decoder], None] = lambda part: None,
    offload: bool = False,
) -> Parallelized:
    """Cut a model over a mesh, in place.

    blocks: what is done to the blocks inside of FSDP's hooks and outside of everything else: recomputing, compiling.
    """
    stages: list[Stage] = []
    if mesh.layout.pipeline > 1:
        stages = split_into_stages(model, mesh.layout, mesh.place.pipeline, in_a_v=config.pipeline_schedule == "zbv")
    parts: Sequence[Decoder] = stages or [model]
    if mesh.layout.tensor > 1:
        for part in parts:
            apply_tensor(part, mesh)
    if mesh.layout.expert > 1:
        for part in parts:
            share_experts(part, mesh)
    blocks(model)
    if mesh.layout.context > 1:
        for part in parts:
            share_rows(part, mesh, config.context_method)
    if not mesh.alone and (mesh.layout.stage_ranks > 1 or offload):
        for part in parts:
            shard(part, mesh, offload=offload)
    return Parallelized(model, stages)


def parallelize_for_inference(model: Decoder, mesh: Mesh) -> None:
    """Cut a model over the tensor and expert axes, in place, to compute one batch that every rank is given whole.

    Attention is this rank's heads, the same on all ranks of the expert axis; sums go to all. `logits` gives them on rank 0,
    and none elsewhere.
    """
    if mesh.layout.tensor > 1:
        fill_up_vocabulary(model, mesh.layout.tensor)
        apply_tensor(model, mesh, whole=True)
    if mesh.layout.expert > 1:
        share_experts_of_all(model, mesh)
    logits_on_the_first(model, mesh)
