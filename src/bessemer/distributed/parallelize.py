"""A single-device model put on a mesh, from outside: the model's code knows nothing of it, and its names stay."""

from __future__ import annotations

from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import shard
from bessemer.model.decoder import Decoder


def parallelize(model: Decoder, mesh: Mesh, config: ParallelConfig, *, offload: bool = False) -> Decoder:
    """Cut a model over a mesh, in place where that can be; returns what this rank trains.

    Called after activation checkpointing and compilation of the blocks, which FSDP's hooks must lie around.
    """
    if mesh.alone:
        return model
    shard(model, mesh, offload=offload)
    return model
