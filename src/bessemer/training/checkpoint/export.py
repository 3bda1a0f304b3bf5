"""Model folders of a run: exported when it is finished, or opened from one of its checkpoints, named RUN@STEP.

A checkpoint of another run also starts a run; several are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.distributed.collectives import whole_tensors
from bessemer.distributed.mesh import Mesh
from bessemer.model.adapters.fingerprints import samples_of_folder
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.adapters.trained import adapter_of, is_trained_by_adapter, merged
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.storage.folder import SCORE, load_model, load_scorer
from bessemer.model.storage.model_config import read_model_config
from bessemer.model.vision.trained import empty_like, load_trained_decoder, save_trained_decoder
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.checkpoint.manager import (
    CHECKPOINTS,
    INDEX,
    checkpoint_of_step,
    checkpoint_weights,
    newest_checkpoint,
    step_of,
    steps_of,
)
from bessemer.training.checkpoint.state import AVERAGE
from bessemer.training.config_parts import ExportSettings
from bessemer.training.optim.weight_averaging import mean_weights
from bessemer.training.runtime import release_freed_memory
from bessemer.training.starting_model import StartingModel


def find_checkpoint(name: str, folder: Path, where: str = "init_from") -> Path:
    """The checkpoint named by `RUN@STEP`: a run's or a stage's folder, relative to `folder`, and a number of steps, or `last`.
    A run stands for its pretraining.

    Raises ConfigError when there is no such run, or no checkpoint at that step, and names those that exist.
    """
    place_name, at, step = name.rpartition("@")
    if not at or not place_name or not (step.isdecimal() or step == "last"):
        raise ConfigError(f"{where}: {name!r} is not a RUN@STEP, as in runs/quickstart@1200 or runs/quickstart@last")
    place = Path(os.path.normpath(folder.resolve() / place_name))
    candidates = [follow(place) / CHECKPOINTS, follow(place / "stages" / "pretrain") / CHECKPOINTS]
    kept = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if kept is None:
        raise ConfigError(
            f"{where}: {place_name}: holds no checkpoints; a stage of another name than pretrain is RUN/stages/NAME"
        )
    steps = steps_of(kept)
    wanted = steps[-1] if step == "last" and steps else int(step) if step.isdecimal() else -1
    if wanted not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"{where}: {place_name} kept no checkpoint of step {step}; it kept {known} (checkpoint_every keeps more)"
        )
    return kept / f"step-{wanted:06d}"


def checkpoint_fingerprint(name: str, folder: Path, steps: int | None = None) -> str:
    """Hash of a checkpoint's index, and so of its files' hashes, for the key of a stage that continues from it to `steps`.

    Raises ConfigError as `find_checkpoint`, and when no step is left.
    """
    checkpoint = find_checkpoint(name, folder)
    gone = step_of(checkpoint)
    if steps is not None and gone >= steps:
        raise ConfigError(f"init_from: {name} is at step {gone:,}; steps must be larger")
    return hash_file(checkpoint / INDEX)


def checkpoint_model(checkpoint: Path) -> tuple[Decoder, Path]:
    """The model of a checkpoint, and the folder of its stage's model, which has its settings and tokenizer.

    Raises ConfigError when the stage is not finished, so that its settings are missing.
    """
    model_folder = _model_beside(checkpoint)
    weights: dict[str, Any] = checkpoint_weights(checkpoint)
    return fill(empty_decoder(read_model_config(model_folder)), weights), model_folder


def averaged_model(checkpoints: Sequence[Path]) -> tuple[Decoder, Path]:
    """The model with the mean weights of checkpoints, and the folder of the model of the first checkpoint's stage.

    Two checkpoints are in memory at a time. Raises ConfigError when their models or tokenizers differ, or a stage is not
    finished.
    """
    folders = [_model_beside(checkpoint) for checkpoint in checkpoints]
    first = read_model_config(folders[0])
    for checkpoint, folder in zip(checkpoints, folders, strict=True):
        for what, same in (
            ("model", read_model_config(folder) == first),
            ("tokenizer", load_tokenizer(folder).hash == load_tokenizer(folders[0]).hash),
        ):
            if not same:
                raise ConfigError(f"{checkpoint}: is of another {what} than {checkpoints[0]}; there is no mean of the two")
    return fill(empty_decoder(first), mean_weights(map(checkpoint_weights, checkpoints))), folders[0]


def _model_beside(checkpoint: Path) -> Path:
    model_folder = checkpoint.parents[1] / "model"
    if not (model_folder / "config.json").is_file():
        raise ConfigError(f"{checkpoint}: its run is not finished; finish it, or continue from it with init_from")
    return model_folder


def save_trained(
    model: Decoder, out: Path, *, tokenizer: Path, mesh: Mesh, config: ExportSettings | None = None, best: int | None = None
) -> None:
    """Write `out/model`: the weights, with `save: ema` their moving average, with `save: best` those after step `best`. With an
    average, the weights or the average that are not there are written to `out/model-weights` or `out/model-ema`.

    One process writes its model; of several, rank 0 writes a checkpoint's, and needs memory for one copy, two with an
    average; the others wait for it.
    """
    # checkpoints do not hold frozen weights
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
                other = fill(empty_like(model), weights if saved == "ema" else average)
                save_trained_decoder(other, out / ("model-weights" if saved == "ema" else "model-ema"), tokenizer=tokenizer)
                chosen = average if saved == "ema" else weights
            if saved == "best" and best is not None:
                chosen = frozen | checkpoint_weights(checkpoint_of_step(out / CHECKPOINTS, best))
            model = fill(empty_like(model), chosen)
        save_trained_decoder(model, out / "model", tokenizer=tokenizer)
    mesh.wait()


def save_trained_adapter(
    model: Decoder, start: StartingModel, out: Path, *, mesh: Mesh, config: ExportSettings, best: int | None = None
) -> None:
    """Write `out/adapter`, a folder of PEFT's, and with `merge` the model with the adapter merged, `out/model`; which numbers
    and what else, as `save_trained` does of weights. Of a model with a scalar head, trained beside the adapter, `out/model`
    alone, as of one that reads pictures.

    start: the model that the run started from, whose weights the adapter is for. Of several processes rank 0 writes, and reads
    that model again to merge, as one process does whose frozen weights lie in half precision.
    """
    assert start.adapter is not None
    own = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_trained_by_adapter(name)
    }
    trained = whole_tensors(own, mesh)
    if mesh.leads:
        for ending, tensors in _chosen(trained, out, config, best).items():
            adapter = adapter_of(model, tensors)
            head = tensors.get(SCORE)
            if head is None and not start.reads_pictures:
                # what the last step has freed would lie beside the file's pages
                release_freed_memory()
                # read again (memory-mapped): this run may have quantised its own copy
                write_adapter(adapter, load_model(start.folder), out / f"adapter{ending}", samples_of_folder(start.folder))
            if start.adapter.merge:
                is_as_read = mesh.alone and start.frozen_dtype == torch.float32
                base = model if is_as_read else _base(start.folder, head)
                whole = merged(base, adapter)
                if head is not None:
                    whole.get_parameter(SCORE).data = head.to(whole.device)
                save_trained_decoder(whole, out / f"model{ending}", tokenizer=start.folder)
    mesh.wait()


def _base(start: Path, head: Tensor | None) -> Decoder:
    """The model of a folder, with a scalar head where one is trained, whose weights are to be replaced."""
    if head is None:
        return load_trained_decoder(start, dtype=torch.float32)
    return load_scorer(start, dtype=torch.float32, seed=0)


def _chosen(trained: dict[str, Tensor], out: Path, config: ExportSettings, best: int | None) -> dict[str, dict[str, Tensor]]:
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
