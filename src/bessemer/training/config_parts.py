"""Parts of the training settings that need no PyTorch: batch sizes by step, the profiled steps.

Batch sizes are constant, or grow in stages up to the run's own (batch-size warm-up). Step n reads the rows behind those of
the steps before it, whatever the sizes: no row is read twice or left out where the size changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting


class Stage(NamedTuple):
    """Steps of one batch size."""

    rows: int
    steps: int


@dataclass(frozen=True)
class BatchSizes:
    """Rows of the batch of every step: those of the stages, then `final`. Steps are counted from 0."""

    final: int
    stages: tuple[Stage, ...] = ()

    @property
    def warmup_steps(self) -> int:
        """Steps before the first batch of `final` rows."""
        return sum(stage.steps for stage in self.stages)

    def of_step(self, step: int) -> int:
        """Rows of the batch of a step."""
        for rows, steps in self.stages:
            if step < steps:
                return rows
            step -= steps
        return self.final

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`: where its own begin."""
        read = 0
        for rows, steps in self.stages:
            if step < steps:
                return read + step * rows
            read, step = read + steps * rows, step - steps
        return read + step * self.final

    def steps_for(self, rows: int) -> int:
        """The fewest steps that read at least this number of rows."""
        return math.ceil(self.steps_to(rows)) if self.stages else -(-rows // self.final)

    def steps_to(self, rows: float) -> float:
        """Steps, the last one in part, after which this number of rows is read."""
        finished = 0
        for size, steps in self.stages:
            if rows < size * steps:
                return finished + rows / size
            rows, finished = rows - size * steps, finished + steps
        return finished + rows / self.final


def growing_sizes(start: int, final: int, increment: int | None) -> list[int]:
    """The sizes before `final`, from `start`: doubled each time, or larger by `increment`.

    Raises ValueError when they do not end at `final`.
    """
    if start >= final:
        raise ValueError(f"starts at {start} rows, which is no less than batch_size {final}")
    sizes = [start]
    while (size := sizes[-1] * 2 if increment is None else sizes[-1] + increment) < final:
        sizes.append(size)
    if size > final:
        how = "doublings of" if increment is None else f"increments of {increment} from"
        raise ValueError(f"{how} {start} rows lead from {sizes[-1]} to {size}, past batch_size {final}")
    return sizes


def stages_by_steps(sizes: list[int], steps: int) -> tuple[Stage, ...]:
    """Stages of about equally many steps, `steps` in all. Raises ValueError when there are fewer steps than sizes."""
    if steps < len(sizes):
        raise ValueError(f"{steps} steps are fewer than the {len(sizes)} sizes before batch_size: {_listed(sizes)}")
    ends = [round(steps * (place + 1) / len(sizes)) for place in range(len(sizes))]
    return tuple(Stage(size, end - begin) for size, begin, end in zip(sizes, [0, *ends], ends, strict=False))


def stages_by_rows(sizes: list[int], rows: float) -> tuple[Stage, ...]:
    """Stages of equally many rows, `rows` in all, each rounded up to whole steps."""
    return tuple(Stage(size, max(1, math.ceil(rows / len(sizes) / size))) for size in sizes)


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


class BatchSizeWarmup(Config):
    """Batches that grow at the beginning of a run, in stages, up to `batch_size`."""

    start: int = setting(description="Rows of the first batches.", unit="sequences", gt=0)
    steps: int | None = setting(
        None, "Steps before batches have batch_size rows, shared evenly by the sizes.", unit="steps", gt=0
    )
    tokens: int | None = setting(
        None, "Tokens instead of steps; each size reads as many of them, rounded up to whole steps.", unit="tokens", gt=0
    )
    increment: int | None = setting(
        None, "Rows that a size has more than the one before; absent: each is twice the one before.", unit="sequences", gt=0
    )
    scale_learning_rate: bool = setting(
        False, "Multiply the learning rate by the root of a batch's rows over batch_size, as suits Adam (Malladi et al. 2022)."
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give steps or tokens, one of them")
        return self

    def batch_sizes(self, batch_size: int, context_length: int) -> BatchSizes:
        """The sizes by step of a run with these settings. Raises ValueError when they do not lead to `batch_size`."""
        sizes = growing_sizes(self.start, batch_size, self.increment)
        if self.steps is not None:
            return BatchSizes(batch_size, stages_by_steps(sizes, self.steps))
        assert self.tokens is not None
        return BatchSizes(batch_size, stages_by_rows(sizes, self.tokens / context_length))


class ProfileConfig(Config):
    """Steps that the profiler records."""

    steps: str = setting(
        description="The first and the last step, counted from 1, as in 10-12; or a single one.", pattern=r"^\d+(-\d+)?$"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not 1 <= self.range.start < self.range.stop:
            raise ValueError(f"steps: {self.steps!r} is no range of steps, which are counted from 1")
        return self

    @property
    def range(self) -> range:
        """The steps, as numbers."""
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)
