"""From a model to what is trained: cut over the mesh, recomputing, compiled, sharded, in the one order that works."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import parallelize
from bessemer.distributed.pipeline import Pipeline
from bessemer.distributed.stages import Stage
from bessemer.model.decoder import Decoder
from bessemer.training.activation_checkpointing import recompute_activations
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import Batch
from bessemer.training.moe_losses import has_router_losses, router_losses
from bessemer.training.precision import use_float8
from bessemer.training.runtime import Session


class Prepared(NamedTuple):
    """What this process trains: of a pipeline, the layers of its own stages, and how the others are reached."""

    model: Decoder
    pipeline: Pipeline | None


def prepare(model: Decoder, config: LoopConfig, session: Session, mesh: Mesh) -> Prepared:
    """Make a model ready to be trained on this process of a mesh, in place.

    Raises ConfigError when the model cannot be cut that way.
    """
    model.train()
    parallel = config.parallel
    mesh.layout.check(model.config, config.context_length)

    if config.float8:
        use_float8(model)

    def blocks(part: Decoder) -> None:
        recompute_activations(part, config.activation_checkpointing)
        session.prepare(part, alone=mesh.alone)

    count = 1
    if mesh.layout.pipeline > 1:
        rows = mesh.layout.rows(mesh.rank, config.batch_size)
        count = mesh.layout.micro_batches(rows.stop - rows.start, config.micro_batch_size, parallel.pipeline_schedule)
    trained, stages = parallelize(model, mesh, parallel, blocks=blocks, offload=config.offload)
    if not stages:
        return Prepared(trained, None)
    pipeline = Pipeline(
        stages,
        mesh,
        parallel.pipeline_schedule,
        count,
        device=torch.device(session.device),
        autocast=session.autocast,
        auxiliary=_router_losses if has_router_losses(model.config) else None,
    )
    return Prepared(trained, pipeline)


def _router_losses(stage: Stage, batch: Batch) -> Tensor | float:
    return router_losses(stage, batch.targets_BT)
