"""The model folder that a finished run leaves."""

from __future__ import annotations

from pathlib import Path

from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder import save_model
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.training.checkpoint import CHECKPOINTS, checkpoint_weights, newest_checkpoint


def save_trained(model: Decoder, out: Path, *, tokenizer: Path, mesh: Mesh) -> None:
    """Write `out/model`, whole, from the model of one process or from the last checkpoint of many.

    Rank 0 writes, and needs memory for one copy; the others wait for it.
    """
    if mesh.leads:
        if not mesh.alone:
            folder = newest_checkpoint(out / CHECKPOINTS)
            assert folder is not None
            model = fill(empty_decoder(model.config), checkpoint_weights(folder))
        save_model(model, out / "model", tokenizer=tokenizer)
    mesh.wait()
