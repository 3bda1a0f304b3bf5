"""A single-device model put on a mesh, from outside: the model's code knows nothing of it, and its names stay."""

from __future__ import annotations

from collections.abc import Callable

from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import shard
from bessemer.model.decoder import Decoder


def parallelize(
    model: Decoder,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    blocks: Callable[[Decoder], None] = lambda part: None,
    offload: bool = False,
) -> Decoder:
    """Cut a model over a mesh, in place where that can be; returns what this rank trains.

    blocks: what is done to the blocks inside of FSDP's hooks and outside of everything else: recomputing, compiling.
    """
    blocks(model)
    if not mesh.alone:
        shard(model, mesh, offload=offload)
    return model
