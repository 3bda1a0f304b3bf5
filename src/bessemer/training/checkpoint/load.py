"""Checkpoints of other runs, named RUN@STEP: to continue training, to open the model of that step, to average several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.model.decoder import Decoder
from bessemer.model.folder_config import read_model_config
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.checkpoint.manager import CHECKPOINTS, INDEX, checkpoint_weights, step_of, steps_of
from bessemer.training.optim.weight_averaging import mean_weights


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
    beside = _model_beside(checkpoint)
    weights: dict[str, Any] = checkpoint_weights(checkpoint)
    return fill(empty_decoder(read_model_config(beside)), weights), beside


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
    beside = checkpoint.parents[1] / "model"
    if not (beside / "config.json").is_file():
        raise ConfigError(f"{checkpoint}: its run is not finished; finish it, or continue from it with init_from")
    return beside
