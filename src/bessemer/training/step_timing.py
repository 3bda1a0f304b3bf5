"""Times of real training steps on random tokens, by which autotuning chooses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bessemer.core.usercode import load_user_function
from bessemer.distributed.mesh import ALONE, Mesh, agree
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.preprocessing import Preprocessor
from bessemer.model.vision.trained import VisionDecoder
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import StatelessBatches
from bessemer.training.data.pictures import PictureTable
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import LossFunction, Objective, build_objective
from bessemer.training.optim.optimizers import build_optimizers, freeze_parameters
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import StartingModel
from bessemer.training.trainer import Trainer

#: Groups of steps whose best time counts, their shortest duration, and the spread above which a measurement is refused.
_GROUPS, _GROUP_SECONDS, _LARGEST_SPREAD = 3, 0.4, 0.3
#: How often an unsteady measurement is repeated before it is refused.
_ATTEMPTS = 3

Value = TypeVar("Value")


@dataclass(frozen=True)
class StepTiming:
    """Time of training steps under one choice: seconds per step in each group, and seconds of the very first step."""

    dtype: str
    compile: bool
    groups: tuple[float, ...]
    first: float

    @property
    def best(self) -> float:
        """Seconds per step in the fastest group: the cost without other load."""
        return min(self.groups)

    @property
    def typical(self) -> float:
        """Seconds per step in the middle group."""
        return sorted(self.groups)[len(self.groups) // 2]

    @property
    def steady(self) -> bool:
        """Whether the groups agree well enough to decide by."""
        return max(self.groups) <= (1 + _LARGEST_SPREAD) * self.best


def agreed(value: Value, mesh: Mesh) -> Value:
    """Rank 0's value on every process."""
    return value if mesh.alone else agree(value)


def measure_steps(config: LoopConfig, model_folder: Path, device: torch.device, folder: Path, mesh: Mesh) -> StepTiming:
    """Time real steps of resolved settings on random tokens, each process its own rows, in the layout of the mesh.

    Every process calls this and gets rank 0's times.
    """
    runtime = Runtime.of(config, device, processes=mesh.processes_here)
    with runtime.running():
        model, load = StartingModel.of(model_folder, config, seed=0).open(device, mesh)
        freeze_parameters(model, config)
        batches = _RandomBatches(config, model)
        prepared = prepare_model(model, config, runtime, mesh)
        if load is not None:
            load(prepared)
        model, pipeline = prepared
        optimizers = build_optimizers(model, config, folder)
        average = None if config.ema is None else MovingAverage(model, config.ema)
        trainer = Trainer(
            model,
            optimizers,
            _objective(config, folder, model.config),
            runtime,
            gradient_clip=config.gradient_clip,
            micro_batch_size=config.micro_batch_size,
            mesh=mesh,
            pipeline=pipeline,
            average=average,
        )
        batch = trainer.read(batches, 0)

        def seconds(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                trainer.step(batch)
            return time.perf_counter() - start

        first = seconds(1)
        count = agreed(max(1, round(_GROUP_SECONDS / seconds(1))), mesh)
        for _ in range(_ATTEMPTS):
            groups = tuple(seconds(count) / count for _ in range(_GROUPS))
            speed = agreed(StepTiming(config.dtype, bool(config.compile), groups, first), mesh)
            if speed.steady:
                break
    return speed


def _objective(config: LoopConfig, folder: Path, model: ModelConfig) -> Objective | LossFunction:
    if isinstance(config, PretrainConfig) and config.loss is not None:
        loss: LossFunction = load_user_function(config.loss, folder)
        return loss
    return _mean_square_of_scores if model.num_scores else build_objective(config, model)


def _mean_square_of_scores(model: Decoder, batch: Batch) -> Tensor:
    """A loss for models with a scalar head, which cannot predict tokens; it takes as long as any loss of scores."""
    return model(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT).square().mean()


class _RandomBatches(StatelessBatches):
    """The same random rows at every step."""

    fingerprint = "random"

    def __init__(self, config: LoopConfig, model: Decoder) -> None:
        self.batch_size = config.batch_size
        self._batch = _random_batch(config, model.config.vocab_size)
        if isinstance(model, VisionDecoder):
            self._batch = _with_pictures(self._batch, model.vision_config)

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        return self._batch.rows(rows)


def _with_pictures(batch: Batch, config: VisionLanguageConfig) -> Batch:
    """The batch with a picture of one tile at the beginning of each row, as far as it holds one; of those in shapes of their
    own a square, of at most a quarter of a row."""
    rows, columns = batch.tokens_BT.shape
    if config.vision.is_native:
        return _with_squares(batch, config)
    side, count = config.vision.image_size, config.tokens_per_tile
    tiles = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), np.uint8)
    vector_of_token_BT = torch.arange(columns).expand(rows, columns) + torch.arange(rows)[:, None] * count
    vector_of_token_BT = vector_of_token_BT.masked_fill(torch.arange(columns) >= count, -1)
    table = PictureTable(tiles, Preprocessor("fixed", 2), count, ())
    return batch.showing(table, vector_of_token_BT)


def _with_squares(batch: Batch, config: VisionLanguageConfig) -> Batch:
    rows, columns = batch.tokens_BT.shape
    vision, tokens = config.vision, max(1, isqrt(columns // 4))
    side = tokens * vision.image_size
    tiles = np.random.default_rng(0).integers(0, 256, rows * side**2 * 3, np.uint8)
    frames = vision.temporal_patch_size
    prepared = Preprocessor("native", 3, patch_size=vision.patch_size, merge_size=vision.merge_size, temporal_patch_size=frames)
    table = PictureTable(tiles, prepared, 0, (), np.full((rows, 2), side, np.int64))
    columns_T, count = torch.arange(columns), tokens**2
    vector_of_token_BT = (columns_T + torch.arange(rows)[:, None] * count).masked_fill(columns_T >= count, -1)
    return batch.showing(table, vector_of_token_BT)


def _random_batch(config: LoopConfig, vocab_size: int) -> Batch:
    shape = (config.batch_size, config.context_length)
    tokens_BT = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if not config.packed:
        return Batch(tokens_BT, tokens_BT)
    columns_BT = torch.arange(config.context_length).expand(shape)
    document_length = max(1, config.context_length // 4)
    return Batch(tokens_BT, tokens_BT, columns_BT % document_length, columns_BT // document_length)
