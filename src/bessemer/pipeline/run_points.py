"""Finished runs as points of a scaling law: parameters, tokens and the loss at the end, from their manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.pipeline.run_folder import RunFolder
from bessemer.scaling.ladder import counted
from bessemer.scaling.laws.points import DegenerateError, Point, Points

#: What may be a run's loss: of the validation split, at the end of training.
LOSSES = ("bits_per_byte", "validation_loss")


@dataclass(frozen=True)
class TrainedRun:
    """What a finished pretraining says. parameters: those that a token meets; flops: of the training, by the model's own count
    (`model.costs.flops_per_token`), attention included. losses: those of `LOSSES` that were measured."""

    name: str
    parameters: int
    non_embedding_parameters: int
    tokens: int
    flops: float
    losses: dict[str, float]
    seconds: float


def trained_run(folder: Path) -> TrainedRun:
    """The pretraining of a run's folder; of several stages of it the last one's loss on the tokens of all.

    Only the end counts: losses on the way were measured before the learning rate's decay. Raises ArtefactError where no
    pretraining is finished.
    """
    from bessemer.model.folder_config import read_model_config

    run = RunFolder(folder.parent, folder.name)
    run.record()
    stages: list[tuple[Path, dict[str, Any]]] = []
    for name, place in run.stages().items():
        manifest = run.manifest(name)
        if manifest is not None and manifest["stage"] == "pretrain":
            stages.append((place, manifest))
    if not stages:
        raise ArtefactError(f"{folder}: the run has no finished stage pretrain, so no point")
    place, manifest = stages[-1]
    model = read_model_config(place / "model")
    tokens = sum(int(one["metrics"]["tokens"]) for _, one in stages)
    context = int(manifest["settings"]["context_length"])
    return TrainedRun(
        run.name,
        counted(model, "all"),
        counted(model, "non-embedding"),
        tokens,
        float(model.flops_per_token(context)) * tokens,
        {name: float(manifest["metrics"][name]) for name in LOSSES if name in manifest["metrics"]},
        float(sum(one["seconds"] for _, one in stages)),
    )


def points_of_runs(folders: Sequence[Path], *, count: str, metric: str) -> Points:
    """The points of runs. Raises ArtefactError for one without a finished pretraining, DegenerateError for one without the
    loss."""
    points = []
    for folder in folders:
        run = trained_run(folder)
        if metric not in run.losses:
            raise DegenerateError(f"{folder}: its pretraining measured no {metric}")
        parameters = run.parameters if count == "all" else run.non_embedding_parameters
        point = Point(parameters, run.tokens, run.losses[metric], run.flops)
        if (problem := point.problem()) is not None:
            raise DegenerateError(f"{folder}: {problem}")
        points.append(point)
    return Points(tuple(points))
