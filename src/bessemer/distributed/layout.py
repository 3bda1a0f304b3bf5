"""Parallel layout: the settings of its axes, a rank's index on each, the layers of its stage. No processes, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.model.attention.base import variant_of_type, variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.costs import layer_parts, mtp_parts

#: Default number of stages per rank of each schedule.
_STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}


class ParallelConfig(Config):
    """Sizes of the parallel axes. Their product is the number of processes. They change results only by rounding, so a run can
    continue under another layout."""

    data_replicate: int = setting(
        1, "Data parallelism: replicas of the model, each with its own rows; with data_shard above 1, hybrid.", gt=0
    )
    data_shard: Literal["auto"] | int = setting(
        "auto",
        "FSDP2: ranks over which weights, gradients and optimizer states are sharded, each with its own rows. auto: all "
        "remaining ranks.",
    )
    context: int = setting(1, "Context parallelism: ranks over which the tokens of a row are sharded.", gt=0)
    tensor: int = setting(
        1,
        "Tensor parallelism: ranks over which every matrix is sharded, and between matrices the tokens (sequence parallel).",
        gt=0,
    )
    pipeline: int = setting(1, "Pipeline parallelism: ranks that hold consecutive layers.", gt=0)
    expert: int = setting(
        1, "Expert parallelism: ranks over which the experts are sharded; a divisor of data_shard × context.", gt=0
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = setting(
        "1f1b",
        "Order of forward and backward passes: gpipe (Huang et al. 2019), 1f1b (Narayanan et al. 2019), interleaved "
        "(Narayanan et al. 2021, several stages per rank), zero_bubble and zbv (Qi et al. 2023, 2024).",
    )
    stages_per_rank: Literal["auto"] | int = setting(
        "auto",
        "Stages per rank of the pipeline axis: more make the bubble shorter and add messages. auto: 2 for interleaved, "
        "zero_bubble and zbv, else 1.",
    )
    context_method: Literal["all_gather", "ring"] = setting(
        "all_gather", "How ranks of the context axis exchange keys and values: all-gathered at once, or passed around a ring."
    )
    timeout: float = setting(
        600.0,
        "Timeout of a collective: a process that waits longer for the others ends with an error.",
        unit="seconds",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        fixed = _STAGES[self.pipeline_schedule]
        if self.stages_per_rank != "auto" and self.stages_per_rank < 1:
            raise ValueError("stages_per_rank must be at least 1, or auto")
        if self.pipeline_schedule in ("gpipe", "1f1b", "zbv") and self.stages_of_rank != fixed:
            raise ValueError(
                f"stages_per_rank {self.stages_per_rank}: a rank of {self.pipeline_schedule} holds {fixed}; interleaved and "
                "zero_bubble take other numbers"
            )
        return self

    @property
    def stages_of_rank(self) -> int:
        """Stages per rank of the pipeline axis."""
        return _STAGES[self.pipeline_schedule] if self.stages_per_rank == "auto" else self.stages_per_rank

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed separately from those of the hidden states."""
        return self.pipeline > 1 and self.pipeline_schedule in ("zero_bubble", "zbv")


#: Pipeline schedules whose number of micro-batches is a multiple of the number of ranks.
_IN_ROUNDS = ("interleaved", "zero_bubble")
#: Micro-batches per rank of the pipeline axis, where the rows allow it: a bubble of at most a fifth of a step.
_MICRO_BATCHES_PER_RANK = 4


class RankCoordinates(NamedTuple):
    """A rank's index on every axis."""

    pipeline: int
    data_replicate: int
    data_shard: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """The size of every axis. Ranks are numbered with the tensor axis innermost, where links are fastest, then context,
    data_shard, data_replicate, and the pipeline outermost. A rank of the pipeline may hold several stages."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    stages_per_rank: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Self:
        """The layout of the settings on `world_size` processes. Raises ConfigError when the numbers do not fit."""
        fixed = config.data_replicate * config.context * config.tensor * config.pipeline
        shard = config.data_shard
        if shard == "auto":
            if world_size % fixed:
                raise ConfigError(
                    f"parallel: {_product(config)} = {fixed} does not divide the {world_size} processes; change one "
                    "of them, or the number of processes"
                )
            shard = world_size // fixed
        if fixed * shard != world_size:
            raise ConfigError(
                f"parallel: {_product(config)} × data_shard {shard} = {fixed * shard}, but there are {world_size} processes"
            )
        if config.expert > 1 and (shard * config.context % config.expert or config.expert % config.context):
            raise ConfigError(
                f"parallel: expert {config.expert} must be a multiple of context {config.context} and divide data_shard × "
                f"context = {shard * config.context}"
            )
        each = config.stages_of_rank if config.pipeline > 1 else 1
        return cls(config.pipeline, config.data_replicate, shard, config.context, config.tensor, config.expert, each)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.data_replicate * self.data_shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks: each reads its own rows."""
        return self.data_replicate * self.data_shard

    @property
    def shard_ranks(self) -> int:
        """Ranks over which FSDP shards weights: those with different rows or tokens."""
        return self.data_shard * self.context

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pipeline * self.stages_per_rank

    @property
    def expert_ranks(self) -> int:
        """Ranks over which the experts of a layer are sharded: the tensor axis included, whose ranks have different tokens
        there."""
        return self.expert * self.tensor

    @property
    def ranks_of_an_expert(self) -> int:
        """Ranks of one model replica with the same experts, over which FSDP shards these."""
        return self.shard_ranks // self.expert

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pipeline

    def place(self, rank: int) -> RankCoordinates:
        """The index of a rank on every axis."""
        assert 0 <= rank < self.world_size
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        rank, shard = divmod(rank, self.data_shard)
        pipeline, replicate = divmod(rank, self.data_replicate)
        return RankCoordinates(pipeline, replicate, shard, context, tensor)

    def rows(self, rank: int, batch_size: int) -> slice:
        """The rows of a batch that a rank reads. Raises ConfigError when the batch does not divide."""
        if batch_size % self.data_ranks:
            raise ConfigError(
                f"batch_size {batch_size} is not divisible by the {self.data_ranks} ranks that read rows of their own "
                f"(data_replicate {self.data_replicate} × data_shard {self.data_shard})"
            )
        each = batch_size // self.data_ranks
        first = self.data_rank(rank) * each
        return slice(first, first + each)

    def row_count(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the data-parallel ranks."""
        return -(-rows // self.data_ranks) * self.data_ranks

    def row_length(self, tokens: int) -> int:
        """`tokens` rounded up to a length that the context axis divides into chunks, and these the tensor axis."""
        multiple = self.tensor * (2 * self.context if self.context > 1 else 1)
        return -(-tokens // multiple) * multiple

    def data_rank(self, rank: int) -> int:
        """The index of a rank among those that read rows of their own; ranks of the other axes share it."""
        place = self.place(rank)
        return place.data_replicate * self.data_shard + place.data_shard

    def columns(self, rank: int, length: int) -> tuple[slice, ...]:
        """The tokens of a row that a rank reads, in order: all of them, or two of 2 × context chunks of equal length.

        Rank r of the context axis has the r-th chunk from the front and the r-th from the back, which balances causal
        attention. Raises ConfigError when the row does not divide.
        """
        if self.context == 1:
            return (slice(0, length),)
        chunks = 2 * self.context
        if length % chunks:
            raise ConfigError(f"parallel: 2 × context {self.context} does not divide a row of {length:,} tokens")
        each = length // chunks
        return tuple(
            slice(chunk * each, (chunk + 1) * each) for chunk in chunks_of_rank(self.place(rank).context, self.context)
        )

    def micro_batches(self, rows: int, size: int | None, schedule: str) -> int:
        """Number of micro-batches of a rank's rows in a pipeline: of `size` rows each, or, when that is None, a few for each
        rank of the axis. Raises ConfigError when the rows do not divide, or are too few."""
        ranks = self.pipeline
        needs = f"parallel: pipeline {ranks} with {schedule} needs"
        multiple = ranks if schedule in _IN_ROUNDS else 1
        possible = [count for count in range(ranks, rows + 1) if rows % count == 0 and count % multiple == 0]
        wanted = f"{ranks} micro-batches or a multiple of that" if multiple > 1 else f"at least {ranks} micro-batches"
        if size is None and not possible:
            raise ConfigError(
                f"{needs} {wanted}, of one size, and the {rows} rows of a rank cannot be cut so; change batch_size"
            )
        if size is None:
            enough = [count for count in possible if count >= _MICRO_BATCHES_PER_RANK * ranks]
            return enough[0] if enough else possible[-1]
        if rows % size:
            raise ConfigError(
                f"micro_batch_size {size} does not divide the {rows} rows of a rank, and those of a pipeline are of one size; "
                "change it or batch_size"
            )
        if rows // size not in possible:
            raise ConfigError(
                f"{needs} {wanted}, and micro_batch_size {size} cuts the {rows} rows of a rank into {rows // size}; change "
                "micro_batch_size or batch_size"
            )
        return rows // size

    def check(self, model: ModelConfig, context_length: int | None) -> None:
        """Raise ConfigError, naming the number that does not divide, when a model does not fit this layout.

        context_length: tokens of a row; None in inference, where rows are not sharded and the vocabulary is padded.
        """
        names = [name for name in _cut_by_tensor(model, self.expert) if name != "vocab_size" or context_length is not None]
        divided = [("tensor", self.tensor, name, getattr(model, name)) for name in names]
        if context_length is not None:
            divided.append(("tensor × context", self.tensor * self.context, "context_length", context_length))
        if self.context > 1:
            assert context_length is not None
            divided.append(("2 × context", 2 * self.context, "context_length", context_length))
            _check_rows_can_be_cut(model)
        if self.expert > 1:
            if not model.num_experts:
                raise ConfigError(f"parallel: expert {self.expert}, but the model has no experts")
            axes = "expert × tensor" if self.tensor > 1 else "expert"
            divided.append((axes, self.expert_ranks, "num_experts", model.num_experts))
            if model.num_experts // self.expert_ranks % self.ranks_of_an_expert:
                # FSDP then shards the matrices of each expert
                axes = "data_shard × context / expert"
                for name, number in (
                    ("hidden_size", model.hidden_size),
                    ("2 × moe_intermediate_size", 2 * model.moe_intermediate_size),
                ):
                    divided.append((axes, self.ranks_of_an_expert, name, number))
        for axis, size, name, number in divided:
            if number % size:
                raise ConfigError(f"parallel: {axis} {size} does not divide {name} {number:,}")
        if self.stages > model.num_hidden_layers:
            each = f" × stages_per_rank {self.stages_per_rank} = {self.stages}" if self.stages_per_rank > 1 else ""
            raise ConfigError(f"parallel: pipeline {self.pipeline}{each} exceeds the model's {model.num_hidden_layers} layers")


def chunks_of_rank(rank: int, ranks: int) -> tuple[int, int]:
    """The two of 2 × `ranks` chunks of a row that a rank of the context axis has."""
    return rank, 2 * ranks - 1 - rank


def _check_rows_can_be_cut(model: ModelConfig) -> None:
    """Raise ConfigError where a layer mixes tokens other than by attention, or depends on the length of the row."""
    for layer_type in model.types:
        if variant_of_type(model, layer_type).recurrent:
            raise ConfigError(
                f"parallel: context cuts rows, and a {layer_type} layer carries its state from token to token; take "
                "data_shard, tensor or pipeline instead"
            )
    if model.num_nextn_predict_layers:
        raise ConfigError(
            "parallel: context cuts rows, and num_nextn_predict_layers needs the tokens behind each part's end; take "
            "data_shard, tensor or pipeline instead"
        )
    if model.rope_scaling.rope_type == "dynamic":
        raise ConfigError(
            "parallel: context cuts rows, and rope_type dynamic goes by their length; take yarn or linear instead"
        )


def _cut_by_tensor(model: ModelConfig, expert: int) -> list[str]:
    """The settings of a model that the tensor axis must divide."""
    sparse = [model.is_sparse(layer) for layer in range(model.num_hidden_layers)]
    names = ["vocab_size"]
    for variant in variants_in(model):
        names += variant.divided_by_tensor
    if not all(sparse):
        names.append("intermediate_size")
    if any(sparse) and expert == 1:
        names.append("num_experts")
    if any(sparse) and model.shared_expert_intermediate_size:
        names.append("shared_expert_intermediate_size")
    return names


def _product(config: ParallelConfig) -> str:
    names = ("data_replicate", "context", "tensor", "pipeline")
    return " × ".join(f"{name} {getattr(config, name)}" for name in names if getattr(config, name) > 1) or "1"


# Shapes: L layers, S stages.


def balanced_stages(model: ModelConfig, stages: int) -> list[range]:
    """Consecutive layers of every stage, at least one: minimises the cost of the most expensive stage, then the sum of squared
    costs.

    The cost of a layer is the number of weights that a token is multiplied with. The head and multi-token prediction blocks
    count with the last layer.
    """
    assert 1 <= stages <= model.num_hidden_layers
    costs = [sum(part.multiplying for part in layer_parts(model, layer)) for layer in range(model.num_hidden_layers)]
    head = model.vocab_size * model.hidden_size
    costs[-1] += head
    if model.num_nextn_predict_layers:
        costs[-1] += model.num_nextn_predict_layers * (head + sum(part.multiplying for part in mtp_parts(model)))
    return _even_ranges(np.array(costs) / sum(costs), stages)


def _even_ranges(costs_L: np.ndarray, stages: int) -> list[range]:
    """Consecutive ranges with the least largest cost, then the least sum of squares; dynamic programming over the last
    range."""
    sums = np.concatenate(([0.0], np.cumsum(costs_L)))
    #: Cost of layers i … j - 1 at [i, j]; infinite for an empty range.
    between = np.where(np.tri(len(sums), dtype=bool), np.inf, sums - sums[:, None])
    largest = _least(between, stages, np.maximum)[0][stages, -1]
    squares = np.where(between <= largest * (1 + 1e-9), between**2, np.inf)
    starts = _least(squares, stages, np.add)[1]
    ranges, end = [], len(costs_L)
    for stage in range(stages, 0, -1):
        start = int(starts[stage, end])
        ranges.append(range(start, end))
        end = start
    return ranges[::-1]


def _least(price: np.ndarray, stages: int, together: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Lowest cost of the first j layers in s ranges, at [s, j], and the start of the last range."""
    best = np.full((stages + 1, len(price)), np.inf)
    starts = np.zeros(best.shape, np.int64)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        tried = together(best[stage - 1][:, None], price)
        starts[stage], best[stage] = tried.argmin(0), tried.min(0)
    return best, starts
