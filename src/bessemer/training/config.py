"""Settings of the training loop, which every stage that trains has. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import model_validator

from bessemer.core.environment import cxx_compiler
from bessemer.core.errors import ConfigError
from bessemer.training.config_parts import (
    VALIDATIONS,
    AdapterConfig,
    BatchSettings,
    CheckpointSettings,
    ComputeSettings,
    ExportSettings,
    KeepBetterConfig,
    MonitoringSettings,
    ValidationSettings,
)
from bessemer.training.optim.lr_schedule import LearningRates, ScheduleSettings, evenly_spaced, multiples
from bessemer.training.optim.registry import OptimizerSettings

#: Shapes for which PyTorch compiles a function before it gives up and runs it eagerly (`recompile_limit`).
_COMPILED_SHAPES = 8


class LoopConfig(
    # pydantic puts the fields of the last base first
    MonitoringSettings,
    CheckpointSettings,
    ComputeSettings,
    ValidationSettings,
    ExportSettings,
    ScheduleSettings,
    OptimizerSettings,
    BatchSettings,
):
    """Settings of every stage that trains; the defaults suit a small model on a CPU."""

    retired: ClassVar[Mapping[str, str]] = {
        "skip_outliers": "skip_loss_spikes",
        "width_base": "mup_base_width",
        "observe_every": "diagnostics_every",
    }
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_fraction", "warmup_steps", "warmup_tokens"),
        ("decay_fraction", "decay_steps", "decay_tokens"),
    )

    @model_validator(mode="after")
    def _check_residuals(self) -> Self:
        if self.residual_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(f"residual_dtype: bfloat16 goes with dtype: bfloat16, not with {self.dtype}")
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> Self:
        if self.profile and self.steps and self.profile.range[-1] > self.steps:
            raise ValueError(f"profile: steps {self.profile.steps}, but the run has {self.steps:,}")
        return self

    @model_validator(mode="after")
    def _check_split_backward(self) -> Self:
        if self.parallel.splits_backward:
            schedule = self.parallel.pipeline_schedule
            if self.compile is True:
                raise ValueError(f"compile: true fuses the backward pass that {schedule} splits in two; set compile: false")
            if self.activation_checkpointing == "selective":
                raise ValueError(
                    f"activation_checkpointing: selective recomputes a block once, and {schedule} needs it twice; set none "
                    "or full, or another pipeline_schedule"
                )
        return self

    @model_validator(mode="after")
    def _check_batch_size_warmup(self) -> Self:
        warmup = self.batch_size_warmup
        if warmup is None:
            return self
        if self.parallel.pipeline > 1:
            raise ValueError(
                "batch_size_warmup: a pipeline has a fixed number of micro-batches of one size; leave one of them out"
            )
        try:
            sizes = self.batch_sizes
        except ValueError as error:
            raise ValueError(f"batch_size_warmup: {error}") from None
        if (conflict := self.rows_conflict(1, self.micro_batch_size)) is not None:
            raise ValueError(conflict)
        if self.compile is not False and self.micro_batch_size is None and len(sizes.stages) >= _COMPILED_SHAPES:
            raise ValueError(
                f"batch_size_warmup: {len(sizes.stages)} sizes before batch_size are too many to compile blocks for each; "
                f"set compile: false, micro_batch_size, or at most {_COMPILED_SHAPES - 1} sizes"
            )
        if self.steps is not None and sizes.warmup_steps > self.steps:
            raise ValueError(f"batch_size_warmup: its {sizes.warmup_steps:,} steps exceed the run's {self.steps:,}")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.steps is not None and self.warmup_length(self.steps) + self.decay_length(self.steps) > self.steps * (1 + 1e-9):
            raise ValueError(
                f"a warm-up of {self.warmup_length(self.steps):,.0f} steps and a decay of {self.decay_length(self.steps):,.0f} "
                f"exceed the run's {self.steps:,}"
            )
        return self

    def warmup_length(self, steps: int) -> float:
        """Steps of the warm-up in a run of `steps`."""
        if self.warmup_tokens is not None and self.batch_size_warmup is not None:
            return self.batch_sizes.steps_to(self.warmup_tokens / self.context_length)
        return self._length(steps, self.warmup_fraction, self.warmup_steps, self.warmup_tokens)

    def decay_length(self, steps: int) -> float:
        """Steps of the decay at the end of a run of `steps`; 0 for a schedule without a decay phase."""
        if self.decay_tokens is not None and self.batch_size_warmup is not None:
            sizes = self.batch_sizes
            return steps - sizes.steps_to(sizes.rows_before(steps) - self.decay_tokens / self.context_length)
        return self._length(steps, self.decay_fraction, self.decay_steps, self.decay_tokens)

    @property
    def learning_rates(self) -> LearningRates:
        """The learning rate's factors by step of a run whose `steps` are known."""
        assert self.steps is not None
        scales = self.batch_size_warmup is not None and self.batch_size_warmup.scale_learning_rate
        return LearningRates(
            self.schedule,
            self.steps,
            self.warmup_length(self.steps),
            self.decay_length(self.steps),
            self.decay_shape,
            self.final_learning_rate_fraction,
            self.batch_sizes if scales else None,
        )

    def guards_loss_spikes(self, step: int) -> bool:
        """Whether `step`, counted from 0, may be skipped as a loss spike.

        By default not in the warm-up and in wsd's decay: loss and norms change with the learning rate there, and the last steps
        are no measure for the next."""
        if self.skip_loss_spikes is True:
            return self.learning_rates.in_constant_phase(step)
        return self.skip_loss_spikes == "always"

    def _length(self, steps: int, fraction: float | None, number: int | None, tokens: int | None) -> float:
        if fraction is not None:
            return fraction * steps
        return float(number or 0) if tokens is None else tokens / (self.batch_size * self.context_length)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents that do not attend to each other, which needs an explicit attention mask."""
        return False

    @property
    def scores(self) -> bool:
        """Whether the model that is trained has a scalar head, `score`, in place of its language head."""
        return False

    @property
    def low_rank(self) -> AdapterConfig | None:
        """The adapter that is trained in place of the weights; None: these are."""
        return None

    @property
    def comparison(self) -> KeepBetterConfig | None:
        """How the trained model is compared with the one that the run starts from; None: not at all."""
        return None

    @property
    def time_limit(self) -> float | None:
        """Minutes that the run may take; None: as many as its steps take."""
        return None

    @property
    def validated_steps(self) -> frozenset[int]:
        """The steps after which a run is validated; the last one always."""
        assert self.steps is not None
        if self.evaluate_every is None:
            return evenly_spaced(self.steps, VALIDATIONS)
        return multiples(self.evaluate_every, self.steps)

    @property
    def resolved(self) -> bool:
        """Whether no setting is left to autotune before training."""
        return self.dtype != "auto" and self.compile != "auto" and self.time_limit is None

    def shortest_from(self, steps: int) -> int:
        """The smallest number of steps, `steps` or more, that holds the warm-ups and the decay."""
        steps = max(steps, self.batch_sizes.warmup_steps)
        while self.warmup_length(steps) + self.decay_length(steps) > steps * (1 + 1e-9):
            steps += 1
        return steps


def check_compiler() -> None:
    """Raise ConfigError without a C++ compiler, with which PyTorch compiles blocks on a CPU."""
    if cxx_compiler() is None:
        raise ConfigError("compile: true needs a C++ compiler (g++ or clang++) and there is none; install one, or say false")
