"""Export of a finished run's model folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bessemer.distributed.gradients import whole_tensors
from bessemer.distributed.mesh import Mesh
from bessemer.model.adapter_folder import write_adapter
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model, save_model
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.score_head import SCORE, load_scorer
from bessemer.model.trained_adapters import adapter_of, is_trained_by_adapter, merged
from bessemer.training.adapter_config import AdapterConfig
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_of_step, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.state import AVERAGE
from bessemer.training.config import LoopConfig
from bessemer.training.starting_model import frozen_dtype


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


def save_trained_adapter(
    model: Decoder,
    settings: AdapterConfig,
    out: Path,
    *,
    start: Path,
    mesh: Mesh,
    config: LoopConfig,
    best: int | None = None,
) -> None:
    """Write `out/adapter`, a folder of PEFT's, and with `merge` the model with the adapter merged, `out/model`; which numbers
    and what else, as `save_trained` does of weights. Of a model with a scalar head, trained beside the adapter, `out/model`
    alone.

    start: the folder of the model that the run started from, whose weights the adapter is for. Of several processes rank 0
    writes, and reads that model again to merge, as one process does whose frozen weights lie in half precision.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if is_trained_by_adapter(name)}
    trained = whole_tensors(own, mesh)
    if mesh.leads:
        for ending, tensors in _chosen(trained, out, config, best).items():
            adapter = adapter_of(model, tensors)
            head = tensors.get(SCORE)
            if head is None:
                # mapped into memory, and as it was before its weights were quantised for this run
                write_adapter(adapter, load_model(start), out / f"adapter{ending}")
            if settings.merge:
                is_as_read = mesh.alone and frozen_dtype(config, start) == torch.float32
                base = model if is_as_read else _base(start, head)
                whole = merged(base, adapter)
                if head is not None:
                    whole.get_parameter(SCORE).data = head.to(whole.device)
                save_model(whole, out / f"model{ending}", tokenizer=start)
    mesh.wait()


def _base(start: Path, head: Tensor | None) -> Decoder:
    """The model of a folder, with a scalar head where one is trained, whose weights are to be replaced."""
    if head is None:
        return load_model(start, dtype=torch.float32)
    return load_scorer(start, dtype=torch.float32, seed=0)


def _chosen(trained: dict[str, Tensor], out: Path, config: LoopConfig, best: int | None) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors by the ending of the folder that is for them. Those that are frozen lie in no checkpoint."""
    if config.save == "best" and best is not None:
        chosen = trained | checkpoint_weights(checkpoint_of_step(out / CHECKPOINTS, best))
    else:
        chosen = trained
    if config.ema is None:
        return {"": chosen}
    newest = newest_checkpoint(out / CHECKPOINTS)
    assert newest is not None
    average = trained | checkpoint_weights(newest, f"others.{AVERAGE}.weights")
    return {"": average, "-weights": chosen} if config.save == "ema" else {"": chosen, "-ema": average}
