"""From a model to what is trained: cut over the mesh, recomputing, compiled, sharded, in the one order that works."""

from __future__ import annotations

from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import parallelize
from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig
from bessemer.training.precision import use_float8
from bessemer.training.recompute import recompute_activations
from bessemer.training.session import Session


def prepare(model: Decoder, config: LoopConfig, session: Session, mesh: Mesh) -> Decoder:
    """Make a model ready to be trained on this process of a mesh; in place as far as the layout allows.

    Raises ConfigError when the model cannot be cut that way.
    """
    model.train()
    mesh.layout.check(model.config, config.context_length)

    def blocks(part: Decoder) -> None:
        if config.float8:
            use_float8(part)
        recompute_activations(part, config.activation_checkpointing)
        session.prepare(part)

    return parallelize(model, mesh, config.parallel, blocks=blocks, offload=config.offload)
