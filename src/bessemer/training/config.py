"""Settings of the training loop, which every stage that trains has. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.environment import cxx_compiler
from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function
from bessemer.distributed.layout import ParallelConfig
from bessemer.training.config_parts import BatchSizes, BatchSizeWarmup, ProfileConfig
from bessemer.training.optim.registry import GROUP, OPTIMIZERS

if TYPE_CHECKING:
    from bessemer.training.adapter_config import AdapterConfig

#: Validations of a run without `evaluate_every`.
VALIDATIONS = 8
#: Shapes for which PyTorch compiles a function before it gives up and runs it eagerly (`recompile_limit`).
_COMPILED_SHAPES = 8


class LoopConfig(Config):
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

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices of the blocks and AdamW for the rest; adamw, sgd, lion, adafactor: that one for all; one "
        "that an installed package adds (entry points bessemer.optimizers); or your own file.py:function, which gets the "
        "groups of parameters and returns a torch Optimizer.",
        code=True,
        plugins=GROUP,
    )
    optimizer_bits: Literal[32, 8] = setting(
        32, "Bits of each number in AdamW's states; 8 (Dettmers et al. 2022) needs torchao.", unit="bits"
    )
    learning_rate: float = setting(5e-3, "Peak learning rate.", gt=0)
    matrix_learning_rate: float | None = setting(
        None,
        "Peak learning rate for the matrices of the blocks; absent: learning_rate. Muon's updates are scaled to the size of "
        "AdamW's, so that one rate serves both.",
        gt=0,
    )
    mup_base_width: int | None = setting(
        None,
        "Hidden width at which the learning rate was tuned. At another one muP (Yang et al. 2022) scales the learning rate of "
        "each kind of weight and, in pretrain, the initial weights of a new model; for muon, adamw, lion. Absent: no scaling.",
        unit="channels",
        gt=0,
    )
    weight_decay: float = setting(
        0.1, "Weight decay of the matrices of the blocks, decoupled but in sgd; nothing else decays.", ge=0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean of gradients, and Lion's β₁.", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean of squared gradients, and Lion's β₂, which wants 0.98.", ge=0, lt=1)
    momentum: float = setting(0.95, "Momentum of Muon and of SGD.", ge=0, lt=1)
    nesterov: bool = setting(True, "Nesterov momentum in Muon and SGD (Nesterov 1983).")
    freeze: list[str] = setting(
        description="Parameters that are not trained, by patterns of their names, as in embed_tokens.* or layers.[0-3].*; they "
        "have no gradients and no optimizer states, and checkpoints leave them out.",
        default_factory=list,
    )
    learning_rate_factors: dict[str, float] = setting(
        description="Factors of the learning rate by patterns of parameters' names, as in {layers.0.*: 0.1}; the first that "
        "matches counts.",
        default_factory=dict,
    )
    gradient_clip: float = setting(1.0, "Largest norm of the gradient; a longer one is scaled down to it.", gt=0)
    z_loss: float = setting(
        0.0,
        "Weight of the mean of (log Σ exp logits)² in the loss, which keeps logits from drifting (PaLM and OLMo 2: 1e-4). "
        "Validation leaves it out.",
        ge=0,
    )

    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt"] = setting(
        "wsd",
        "Learning rate after the warm-up. wsd: constant, then a decay at the end (Hu et al. 2024); cosine, linear: decay over "
        "the whole run; inverse_sqrt: one over the root of the step, whatever the end (docs/optimizers.md).",
    )
    warmup_fraction: float | None = setting(
        0.03, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    warmup_steps: int | None = setting(None, "Warm-up as a number of steps instead of a fraction.", unit="steps", ge=0)
    warmup_tokens: int | None = setting(None, "Warm-up as a number of tokens instead of a fraction.", unit="tokens", ge=0)
    decay_fraction: float | None = setting(
        0.3, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )
    decay_steps: int | None = setting(None, "Decay as a number of steps instead of a fraction.", unit="steps", ge=0)
    decay_tokens: int | None = setting(None, "Decay as a number of tokens instead of a fraction.", unit="tokens", ge=0)
    decay_shape: Literal["linear", "1-sqrt"] = setting(
        "linear", "wsd: linear decay, or fast at first and slow later (1-sqrt, Hägele et al. 2024)."
    )
    final_learning_rate_fraction: float = setting(
        0.0, "Final learning rate as a fraction of its peak; the minimum of inverse_sqrt.", ge=0, le=1
    )

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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Dtype of matmuls; the weights stay float32. auto: float32 or bfloat16, the faster one, measured at the start. "
        "float16 uses loss scaling.",
    )
    float8: bool = setting(False, "Matmuls of the blocks in float8, through torchao, on GPUs that support it.")
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
    checkpoint_minutes: float = setting(1.0, "Time between checkpoints.", unit="minutes", affects_output=False, gt=0)
    checkpoint_every: int | None = setting(
        None,
        "Keep the first checkpoint and those at multiples of this number of steps.",
        unit="steps",
        affects_output=False,
        gt=0,
    )
    checkpoint_background: Literal["auto"] | bool = setting(
        "auto", "Write checkpoints from a copy while training continues. auto: on a GPU.", affects_output=False
    )
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

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if not is_user_function(name):
            try:
                OPTIMIZERS.find(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.mup_base_width is not None and self.optimizer in ("sgd", "adafactor"):
            raise ValueError(
                "mup_base_width is for muon, adamw, lion and your own, whose updates do not depend on the gradient's size: not "
                f"{self.optimizer}"
            )
        return self

    @model_validator(mode="after")
    def _check_saved(self) -> Self:
        if self.save == "ema" and self.ema is None:
            raise ValueError("save: ema needs an average: set ema, as in ema: 0.999")
        return self

    @field_validator("learning_rate_factors")
    @classmethod
    def _positive_factors(cls, factors: dict[str, float]) -> dict[str, float]:
        for pattern, factor in factors.items():
            if factor <= 0:
                raise ValueError(f"{pattern!r}: {factor:g} is no factor of a learning rate; freeze leaves parameters out")
        return factors

    @model_validator(mode="after")
    def _check_profile(self) -> Self:
        if self.profile and self.steps and self.profile.range[-1] > self.steps:
            raise ValueError(f"profile: steps {self.profile.steps}, but the run has {self.steps:,}")
        return self

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        if self.optimizer_bits != 32 and self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer_bits: {self.optimizer_bits} is for AdamW's states, and {self.optimizer} has none")
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

    @model_validator(mode="before")
    @classmethod
    def _replace_default_lengths(cls, values: Any) -> Any:
        """A length in steps or tokens replaces the default fraction."""
        if not isinstance(values, dict):
            return values
        for phase in ("warmup", "decay"):
            replaced = any(values.get(f"{phase}_{unit}") is not None for unit in ("steps", "tokens"))
            if replaced or (phase == "decay" and values.get("schedule", "wsd") != "wsd"):
                values = {f"{phase}_fraction": None, **values}
        return values

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for phase in ("warmup", "decay"):
            names = [f"{phase}_{unit}" for unit in ("fraction", "steps", "tokens")]
            given = [name for name in names if getattr(self, name) is not None]
            if phase == "decay" and self.schedule != "wsd":
                if given:
                    raise ValueError(f"{given[0]} is for schedule: wsd, and {self.schedule} has no decay phase: leave it out")
            elif len(given) != 1:
                raise ValueError(f"give exactly one of {', '.join(names)}, not {' and '.join(given) or 'none'}")
        if self.schedule != "wsd" and self.decay_shape != "linear":
            raise ValueError(f"decay_shape: {self.decay_shape} is for schedule: wsd, not for {self.schedule}")
        if (self.warmup_fraction or 0) + (self.decay_fraction or 0) > 1:
            raise ValueError("warmup_fraction and decay_fraction together exceed 1")
        if self.steps is not None and self.warmup_length(self.steps) + self.decay_length(self.steps) > self.steps * (1 + 1e-9):
            raise ValueError(
                f"a warm-up of {self.warmup_length(self.steps):,.0f} steps and a decay of {self.decay_length(self.steps):,.0f} "
                f"exceed the run's {self.steps:,}"
            )
        return self

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

    def guards_loss_spikes(self, step: int) -> bool:
        """Whether `step`, counted from 0, may be skipped as a loss spike.

        By default not in the warm-up and in wsd's decay: loss and norms change with the learning rate there, and the last steps
        are no measure for the next."""
        assert self.steps is not None
        if self.skip_loss_spikes is True:
            return self.warmup_length(self.steps) <= step < self.steps - self.decay_length(self.steps)
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
    def time_limit(self) -> float | None:
        """Minutes that the run may take; None: as many as its steps take."""
        return None

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
