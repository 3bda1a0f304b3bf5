"""Export of a finished run's model folders."""

from __future__ import annotations

from pathlib import Path

from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder import save_model
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.state import AVERAGE
from bessemer.training.config import LoopConfig


def save_trained(model: Decoder, out: Path, *, tokenizer: Path, mesh: Mesh, config: LoopConfig | None = None) -> None:
    """Write `out/model`: the weights, or with `save: ema` their moving average. With an average, the other one is written to
    `out/model-weights` or `out/model-ema`.

    One process writes its model; of several, rank 0 writes the last checkpoint, and needs memory for one copy, two with an
    average; the others wait for it.
    """
    if mesh.leads:
        averaged = config is not None and config.ema is not None
        saved = config.save if config is not None else "weights"
        if not mesh.alone or averaged:
            folder = newest_checkpoint(out / CHECKPOINTS)
            assert folder is not None
            weights = checkpoint_weights(folder)
            if averaged:
                average = weights | checkpoint_weights(folder, f"others.{AVERAGE}.weights")
                beside = fill(empty_decoder(model.config), weights if saved == "ema" else average)
                save_model(beside, out / ("model-weights" if saved == "ema" else "model-ema"), tokenizer=tokenizer)
                weights = average if saved == "ema" else weights
            model = fill(empty_decoder(model.config), weights)
        save_model(model, out / "model", tokenizer=tokenizer)
    mesh.wait()
