"""Prepare a model for training: float8, parallelism, activation checkpointing, compilation, sharding, in the order that
works."""

from __future__ import annotations

from collections.abc import Sequence
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
from bessemer.training.runtime import Runtime


class PreparedModel(NamedTuple):
    """The model that this process trains; under pipeline parallelism the layers of its stages, and the pipeline."""

    model: Decoder
    pipeline: Pipeline | None

    @property
    def parts(self) -> Sequence[Decoder]:
        """What of the model is computed here: its stages of a pipeline, else the model itself."""
        return [self.model] if self.pipeline is None else self.pipeline.stages


def prepare_model(model: Decoder, config: LoopConfig, runtime: Runtime, mesh: Mesh) -> PreparedModel:
    """Prepare a model, in place, to be trained on this process of a mesh.

    Raises ConfigError when the layout does not divide the model.
    """
    model.train()
    parallel = config.parallel
    mesh.layout.check(model.config, config.context_length)

    if config.float8:
        use_float8(model)
    # what recomputes selectively does not know its kernel; a pipeline's stages and rows in parts have masks of their own
    if config.packed and mesh.layout.context == mesh.layout.pipeline == 1 and config.activation_checkpointing != "selective":
        runtime.skip_masked_blocks(model)

    def blocks(part: Decoder) -> None:
        recompute_activations(part, config.activation_checkpointing)
        runtime.compile_blocks(part, alone=mesh.alone)

    count = 1
    if mesh.layout.pipeline > 1:
        rows = mesh.layout.rows(mesh.rank, config.batch_size)
        count = mesh.layout.micro_batches(rows.stop - rows.start, config.micro_batch_size, parallel.pipeline_schedule)
    # float8 takes its scales from the weights as they are stored
    dtype = None if config.float8 else runtime.gathered_dtype
    trained, stages = parallelize(model, mesh, parallel, blocks=blocks, dtype=dtype, offload=config.offload)
    if not stages:
        return PreparedModel(trained, None)
    pipeline = Pipeline(
        stages,
        mesh,
        parallel.pipeline_schedule,
        count,
        device=torch.device(runtime.device),
        autocast=runtime.autocast,
        auxiliary=_router_losses if has_router_losses(model.config) else None,
    )
    return PreparedModel(trained, pipeline)


def _router_losses(stage: Stage, batch: Batch) -> Tensor | float:
    return router_losses(stage, batch.targets_BT)
