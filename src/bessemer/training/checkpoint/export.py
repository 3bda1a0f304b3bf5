"""Export of a finished run's model folders."""

from __future__ import annotations

from pathlib import Path

from bessemer.distributed.gradients import whole_tensors
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder import save_model
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_of_step, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.state import AVERAGE
from bessemer.training.config import LoopConfig


def save_trained(
    model: Decoder, out: Path, *, tokenizer: Path, mesh: Mesh, config: LoopConfig | None = None, best: int | None = None
) -> None:
    """Write `out/model`: the weights, with `save: ema` their moving average, with `save: best` those after step `best`. With an
    average, the weights or the average that are not there are written to `out/model-weights` or `out/model-ema`.

    One process writes its model; of several, rank 0 writes a checkpoint's, and needs memory for one copy, two with an
    average; the others wait for it.
    """
    # checkpoints leave them out
    left_out = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    frozen = {name: weight.cpu() for name, weight in whole_tensors(left_out, mesh).items()}
    if mesh.leads:
        averaged = config is not None and config.ema is not None
        saved = config.save if config is not None else "weights"
        if not mesh.alone or averaged or saved == "best":
            folder = newest_checkpoint(out / CHECKPOINTS)
            assert folder is not None
            weights = frozen | checkpoint_weights(folder)
            chosen = weights
            if averaged:
                average = weights | checkpoint_weights(folder, f"others.{AVERAGE}.weights")
                beside = fill(empty_decoder(model.config), weights if saved == "ema" else average)
                save_model(beside, out / ("model-weights" if saved == "ema" else "model-ema"), tokenizer=tokenizer)
                chosen = average if saved == "ema" else weights
            if saved == "best" and best is not None:
                chosen = frozen | checkpoint_weights(checkpoint_of_step(out / CHECKPOINTS, best))
            model = fill(empty_decoder(model.config), chosen)
        save_model(model, out / "model", tokenizer=tokenizer)
    mesh.wait()
