"""Parts of the training settings, which `LoopConfig` inherits, so that a recipe names them without nesting. No PyTorch.

Batch sizes are constant, or grow in stages up to the run's own (batch-size warm-up). Step n reads the rows behind those of
the steps before it, whatever the sizes: no row is read twice or left out where the size changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from bessemer.core.config import Config, setting
from bessemer.distributed.layout import ParallelConfig


class BatchSizeStage(NamedTuple):
    """Steps of one batch size."""

    rows: int
    steps: int


@dataclass(frozen=True)
class BatchSizes:
    """Rows of the batch of every step: those of the stages, then `final`. Steps are counted from 0."""

    final: int
    stages: tuple[BatchSizeStage, ...] = ()

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


def stages_by_steps(sizes: list[int], steps: int) -> tuple[BatchSizeStage, ...]:
    """Stages of about equally many steps, `steps` in all. Raises ValueError when there are fewer steps than sizes."""
    if steps < len(sizes):
        raise ValueError(f"{steps} steps are fewer than the {len(sizes)} sizes before batch_size: {_listed(sizes)}")
    ends = [round(steps * (place + 1) / len(sizes)) for place in range(len(sizes))]
    return tuple(BatchSizeStage(size, end - begin) for size, begin, end in zip(sizes, [0, *ends], ends, strict=False))


def stages_by_rows(sizes: list[int], rows: float) -> tuple[BatchSizeStage, ...]:
    """Stages of equally many rows, `rows` in all, each rounded up to whole steps."""
    return tuple(BatchSizeStage(size, max(1, math.ceil(rows / len(sizes) / size))) for size in sizes)


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
    """Which steps the profiler records."""

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


class BatchSettings(Config):
    """The batch of every step, and the processes that share it."""

    steps: int | None = setting(None, "Optimizer steps.", unit="steps", gt=0)
    batch_size: int = setting(8, "Rows of a batch.", unit="sequences", gt=0)
    batch_size_warmup: BatchSizeWarmup | None = setting(
        None, "Start with smaller batches: batch-size warm-up (docs/trainer.md). Absent: all have batch_size rows."
    )
    context_length: int = setting(256, "Tokens of a row.", unit="tokens", gt=0)
    micro_batch_size: int | None = setting(
        None,
        "Rows of one forward pass of one process; absent: all its rows. Fewer need less memory.",
        unit="sequences",
        affects_output=False,
        gt=0,
    )
    parallel: ParallelConfig = setting(
        description="How a step is parallelised over processes.", affects_output=False, default_factory=ParallelConfig
    )

    @property
    def batch_sizes(self) -> BatchSizes:
        """Rows of the batch of every step."""
        if self.batch_size_warmup is None:
            return BatchSizes(self.batch_size)
        return self.batch_size_warmup.batch_sizes(self.batch_size, self.context_length)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`, counted from 0."""
        return self.batch_sizes.rows_before(step) * self.context_length

    def rows_conflict(self, data_ranks: int, micro_batch_size: int | None) -> str | None:
        """Why a batch of the warm-up cannot be shared among ranks that read rows of their own, and cut into whole
        micro-batches; None when all can."""
        each = data_ranks * (micro_batch_size or 1)
        odd = next((stage.rows for stage in self.batch_sizes.stages if stage.rows % each), None)
        if odd is None:
            return None
        ranks = [f"{data_ranks} ranks"] if data_ranks > 1 else []
        micro = [f"micro_batch_size {micro_batch_size}"] if micro_batch_size else []
        return f"batch_size_warmup: a batch of {odd} rows is no multiple of {' × '.join(ranks + micro)}"


#: Validations of a run without `evaluate_every`.
VALIDATIONS = 8


class ExportSettings(Config):
    """Which weights a run ends with: the last, their moving average, or the best."""

    ema: float | None = setting(
        None,
        "Keep an exponential moving average of the weights with this decay, as in 0.999, in float32; the decay is smaller in "
        "the first steps. It is validated at the end.",
        ge=0,
        lt=1,
    )
    save: Literal["weights", "ema", "best"] = setting(
        "weights",
        "What model/ holds at the end: the last weights; their average (then these lie in model-weights/, and the average in "
        "model-ema/ otherwise); or the weights at the lowest validation loss, whose checkpoint is kept.",
    )

    @model_validator(mode="after")
    def _check_saved(self) -> Self:
        if self.save == "ema" and self.ema is None:
            raise ValueError("save: ema needs an average: set ema, as in ema: 0.999")
        return self


class ValidationSettings(Config):
    """Validation, tasks answered during training, and what ends a run early or skips a step."""

    evaluate_every: int | None = setting(
        None, "Steps between validations; absent: an eighth of the run. The last step is always validated.", unit="steps", gt=0
    )
    tasks: list[str] = setting(
        description="Tasks that the model answers while it is trained, by name or YAML file (docs/tasks.md); in one process. "
        "They take time besides `minutes`, and change no weight.",
        affects_output=False,
        default_factory=list,
    )
    tasks_every: int | None = setting(
        None, "Steps between answers to the tasks; absent: at each validation.", unit="steps", affects_output=False, gt=0
    )
    tasks_limit: int = setting(200, "Items of each task, the first ones.", unit="items", affects_output=False, gt=0)
    tasks_data: str | None = setting(None, "Folder of the tasks' data; absent: beside the task file.", affects_output=False)
    early_stopping_patience: int | None = setting(
        None, "End the run after this many validations in a row without a lower loss than before; absent: never.", gt=0
    )

    skip_loss_spikes: Literal["always"] | bool = setting(
        True,
        "Skip a step whose loss or gradient norm lies more than 6 deviations above the median of the last 128 steps, and above "
        "1.3 times that loss or 3 times that norm. true: between the warm-up and wsd's decay; always: in these too.",
    )


class ComputeSettings(Config):
    """How a step is computed: dtypes, memory, compilation, threads."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Dtype of matmuls; the weights stay float32. auto: float32 or bfloat16, the faster one, measured at the start. "
        "float16 uses loss scaling.",
    )
    float8: bool = setting(False, "Matmuls of the blocks in float8, through torchao, on GPUs that support it.")
    residual_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Dtype of the residual stream under `dtype: bfloat16`; bfloat16 takes half the memory, and rounds each layer's sum.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "What the backward pass recomputes: nothing, everything but matmuls and attention, whole blocks.",
        affects_output=False,
    )
    offload: bool = setting(False, "Keep sharded weights and optimizer states in host memory (CUDA).", affects_output=False)
    compile: Literal["auto"] | bool = setting(
        "auto", "Compile the blocks one by one. auto: when the measured time that it saves exceeds the time it takes."
    )
    threads: Annotated[int, Field(gt=0)] | Literal["auto"] | None = setting(
        None,
        "CPU threads; absent: every usable core. auto: every usable core, and fewer while other programs take some, measured "
        "along the way. Another number rounds differently: the choices are kept, and a resumed run repeats them.",
        affects_output=False,
    )
    deterministic: bool = setting(
        False,
        "On a GPU, use deterministic algorithms: the same run on the same cards gives the same weights, bit for bit. Some are "
        "slower, and an operation without one is an error. On a CPU always on.",
        affects_output=False,
    )


class CheckpointSettings(Config):
    """When checkpoints are written, and which are kept."""

    checkpoint_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = setting(
        "auto",
        "Time between checkpoints. auto: 1, and 30 in a run that takes two hours or more.",
        unit="minutes",
        affects_output=False,
    )
    checkpoint_every: int | None = setting(
        None,
        "Keep the first checkpoint and those at multiples of this number of steps.",
        unit="steps",
        affects_output=False,
        gt=0,
    )
    checkpoint_background: Literal["auto"] | bool = setting(
        "auto",
        "Write checkpoints from a copy in host memory, pinned on a GPU, while training continues. auto: on a GPU.",
        affects_output=False,
    )

    def minutes_between_checkpoints(self, expected_seconds: float) -> float:
        """Time between checkpoints of a run that is expected to take as long."""
        if self.checkpoint_minutes != "auto":
            return self.checkpoint_minutes
        return _OFTEN if expected_seconds < _HOURS_SECONDS else _SELDOM


#: Minutes between checkpoints of short and of long runs, and from which seconds on a run is long.
_OFTEN, _SELDOM, _HOURS_SECONDS = 1.0, 30.0, 2 * 3600


class MonitoringSettings(Config):
    """What is logged of a run, and where."""

    log_every: int = setting(1, "Steps between lines of metrics.jsonl.", unit="steps", affects_output=False, gt=0)
    profile: ProfileConfig | None = setting(
        None,
        "Steps to profile: a trace, a table of operators and, on a GPU, a memory snapshot are written to profile/.",
        affects_output=False,
    )
    track: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        description="Experiment trackers that also get the records of metrics.jsonl.",
        affects_output=False,
        default_factory=list,
    )
    track_project: str = setting("bessemer", "Name of the project in wandb and trackio.", affects_output=False)
    diagnostics_every: int = setting(
        100,
        "Steps between diagnostics: norms by layer, activation outliers, loss by source, memory. Each costs one more forward "
        "pass; the last step has them too. 0: never.",
        unit="steps",
        affects_output=False,
        ge=0,
    )


class AdapterConfig(Config):
    """A low-rank adapter that is trained in place of the weights (LoRA; Hu et al. 2021)."""

    shorthand: ClassVar[str | None] = "rank"

    rank: int = setting(16, "Rank r of every update B A.", gt=0)
    alpha: float = setting(32.0, "Updates are scaled by alpha / rank.", gt=0)
    rslora: bool = setting(False, "Scale by alpha / √rank instead (Kalajdzievski 2023).")
    dora: bool = setting(
        False, "Train the norm of every row of W + s B A too, apart from its direction (Liu et al. 2024); in one process."
    )
    dropout: float = setting(
        0.0, "Share of a layer's inputs that its update does not see in a step; in one process.", ge=0, lt=1
    )
    modules: list[str] = setting(
        description="Linear layers that are changed, by patterns of their names or of the last part, as in q_proj or "
        "layers.[0-3].*; empty: all of attention, feed-forward and shared experts.",
        default_factory=list,
    )
    modules_to_save: list[str] = setting(
        description="Modules that are trained whole beside the updates, by patterns of their names or of the last part, as in "
        "embed_tokens, lm_head, norm; their weights are no codes and lie in float32. In one process.",
        default_factory=list,
    )
    quantize: Literal["int8", "int4", "nf4"] | None = setting(
        None,
        "Hold the frozen weights of the blocks in 8 or 4 bits (QLoRA; Dettmers et al. 2023): int4 in groups of 32 with float32 "
        "scales, nf4 as the paper has it; absent: as the model's folder has them, which may be quantised itself.",
    )
    merge: bool = setting(
        True,
        "Also write model/, the weights with the adapter merged into them, which a later stage can read; false: the adapter "
        "alone.",
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class KeepBetterConfig(Config):
    """When a stage gives up what it trained: where that is worse than the model it started from, on the same items."""

    shorthand: ClassVar[str | None] = "tasks"

    tasks: list[str] = setting(
        description="Tasks that both models are asked, by name or YAML file (docs/tasks.md); `tasks_data` is their folder.",
        default_factory=list,
    )
    held_out: bool = setting(
        True,
        "Compare on the stage's own held-out data too: the loss of its rows in sft and preference, the reward of its prompts, "
        "completed greedily, in rl.",
    )
    limit: int = setting(500, "Most items of each task, and of the held-out data, the first ones.", unit="items", gt=0)
    confidence: float = setting(
        0.95,
        "The trained model is worse where, of any measure, this confidence interval of the paired difference lies below 0; 0: "
        "where the mean does.",
        ge=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _check_measures(self) -> Self:
        if not self.tasks and not self.held_out:
            raise ValueError("held_out: false leaves nothing to compare on; name tasks")
        return self
