"""A checkpoint that another run left, named RUN@STEP: to train on from it, to look at the model as it was then, to
average several."""

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
    """The checkpoint that `RUN@STEP` means: a run's or a stage's folder, found from `folder`, and a number of steps, or
    `last`. A run's means its pretraining.

    Raises ConfigError when there is no such run, or no checkpoint at that step, and names those that there are.
    """
    place_name, at, step = name.rpartition("@")
    if not at or not place_name or not (step.isdecimal() or step == "last"):
        raise ConfigError(f"{where}: {name!r} is no RUN@STEP, as in runs/quickstart@1200 or runs/quickstart@last")
    place = Path(os.path.normpath(folder.resolve() / place_name))
    candidates = [follow(place) / CHECKPOINTS, follow(place / "stages" / "pretrain") / CHECKPOINTS]
    kept = next((found for found in candidates if found.is_dir()), None)
    if kept is None:
        raise ConfigError(f"{where}: {place_name}: holds no checkpoints of a run")
    steps = steps_of(kept)
    wanted = steps[-1] if step == "last" and steps else int(step) if step.isdecimal() else -1
    if wanted not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"{where}: {place_name} kept no checkpoint of step {step}; it kept {known} (checkpoint_every keeps more)"
        )
    return kept / f"step-{wanted:06d}"


def checkpoint_fingerprint(name: str, folder: Path, steps: int | None = None) -> str:
    """Hash of a checkpoint's index, and so of its files' hashes, which enters the key of what goes on from it to `steps`.

    Raises ConfigError as `find_checkpoint`, and when there is nothing left to go on with.
    """
    checkpoint = find_checkpoint(name, folder)
    gone = step_of(checkpoint)
    if steps is not None and gone >= steps:
        raise ConfigError(f"init_from: {name} has gone {gone:,} steps; steps must be more than that")
    return hash_file(checkpoint / INDEX)


def checkpoint_model(checkpoint: Path) -> tuple[Decoder, Path]:
    """The model as a checkpoint holds it, and the folder of its stage's model, whose settings and tokenizer are its own.

    Raises ConfigError when the stage was never finished, so that nothing says what the weights are.
    """
    beside = _model_beside(checkpoint)
    weights: dict[str, Any] = checkpoint_weights(checkpoint)
    return fill(empty_decoder(read_model_config(beside)), weights), beside


def averaged_model(checkpoints: Sequence[Path]) -> tuple[Decoder, Path]:
    """The model whose weights are the mean of those that checkpoints hold, and the folder of the first one's stage's model.

    Two of them are in memory at a time. Raises ConfigError when their models or tokenizers differ, or a stage was never
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
        raise ConfigError(f"{checkpoint}: its run is not finished; finish it, or go on from it with init_from")
    return beside
