"""Settings of the training loop, and of the stage `pretrain`."""

from __future__ import annotations

import shutil
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function
from bessemer.distributed.config import ParallelConfig

#: Raised when the same settings and inputs give other weights than before (golden outputs in the tests).
PRETRAIN_VERSION = 4

#: Optimizers that `optimizer` may name, besides a user's own.
OPTIMIZERS = ("muon", "adamw", "sgd", "lion", "adafactor")

#: Validations of a run that names no interval.
VALIDATIONS = 8


class ProfileConfig(Config):
    """Which steps are recorded from inside."""

    steps: str = setting(
        description="The first and the last, counted from 1, as in 10-12; or a single one.", pattern=r"^\d+(-\d+)?$"
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


class LoopConfig(Config):
    """What every stage that trains may set; the defaults are those of a small model on a processor."""

    steps: int | None = setting(None, "Optimizer steps.", unit="steps", gt=0)
    batch_size: int = setting(8, "Rows of a batch.", unit="sequences", gt=0)
    context_length: int = setting(256, "Tokens of a row.", unit="tokens", gt=0)
    micro_batch_size: int | None = setting(
        None,
        "Rows of one forward pass of one process; absent: all that it has. Fewer need less memory.",
        unit="sequences",
        affects_output=False,
        gt=0,
    )
    parallel: ParallelConfig = setting(
        description="How a step is spread over processes.", affects_output=False, default_factory=ParallelConfig
    )

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices of the blocks and AdamW for the rest; adamw, sgd, lion, adafactor: that one for all; or "
        "your own file.py:function, which gets the groups of parameters and returns a torch Optimizer.",
        code=True,
    )
    optimizer_bits: Literal[32, 8] = setting(
        32, "Bits of a number in AdamW's states; 8 (Dettmers et al. 2022) needs torchao.", unit="bits"
    )
    learning_rate: float = setting(5e-3, "Peak learning rate.", gt=0)
    matrix_learning_rate: float | None = setting(
        None,
        "Peak learning rate for the matrices of the blocks; absent: learning_rate. Muon's updates are scaled to the size of "
        "AdamW's, so that one rate serves both.",
        gt=0,
    )
    width_base: int | None = setting(
        None,
        "Hidden width at which the learning rate was tuned. At another one each kind of weight gets the learning rate, and in "
        "pretrain a new model the initial weights, that behave alike there (muP, Yang et al. 2022; for muon, adamw and lion). "
        "Absent: rates are as they are, whatever the width.",
        unit="channels",
        gt=0,
    )
    weight_decay: float = setting(
        0.1, "Weight decay of the matrices of the blocks, decoupled but in sgd; nothing else decays.", ge=0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean of gradients, and Lion's β₁.", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean of squared gradients, and Lion's β₂, which wants 0.98.", ge=0, lt=1)
    momentum: float = setting(0.95, "Momentum of Muon and of SGD.", ge=0, lt=1)
    nesterov: bool = setting(True, "Whether Muon and SGD look one step of their momentum ahead (Nesterov 1983).")
    gradient_clip: float = setting(1.0, "Largest norm of the gradient; a longer one is scaled down to it.", gt=0)
    z_loss: float = setting(
        0.0,
        "Weight of the mean of (log Σ exp logits)² in the loss, which keeps logits from drifting (PaLM and OLMo 2: 1e-4). "
        "Validation leaves it out.",
        ge=0,
    )

    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt"] = setting(
        "wsd",
        "How the learning rate goes after its warm-up. wsd: it stays and falls at the end (Hu et al. 2024); cosine, linear: it "
        "falls to the end; inverse_sqrt: as one over the root of the step, whatever the end (docs/optimizers.md).",
    )
    warmup_fraction: float | None = setting(0.03, "Share of the steps in which the learning rate rises from zero.", ge=0, le=1)
    warmup_steps: int | None = setting(None, "The same as a number of steps, in place of a share.", unit="steps", ge=0)
    warmup_tokens: int | None = setting(None, "The same as a number of tokens.", unit="tokens", ge=0)
    decay_fraction: float | None = setting(
        0.3, "wsd: share of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )
    decay_steps: int | None = setting(None, "The same as a number of steps, in place of a share.", unit="steps", ge=0)
    decay_tokens: int | None = setting(None, "The same as a number of tokens.", unit="tokens", ge=0)
    decay_shape: Literal["linear", "1-sqrt"] = setting(
        "linear", "wsd: in a line, or fast first and slowly later (1-sqrt, Hägele et al. 2024)."
    )
    final_learning_rate_fraction: float = setting(
        0.0, "What the learning rate falls to, as a share of its peak; of inverse_sqrt, what it never falls below.", ge=0, le=1
    )

    ema: float | None = setting(
        None,
        "Keep a moving average of the weights with this decay, as in 0.999, in float32; a young one forgets faster. It is "
        "validated at the end.",
        ge=0,
        lt=1,
    )
    save: Literal["weights", "ema"] = setting(
        "weights", "What model/ holds in the end, where there is an average; the other lies in model-ema/ or model-weights/."
    )

    skip_outliers: bool = setting(
        True, "Leave out a step whose loss or gradient norm lies more than 6 standard deviations above the last 128."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Type of the products; the weights stay float32. auto: float32 or bfloat16, the faster one, measured at the start. "
        "float16 scales the loss.",
    )
    float8: bool = setting(False, "Products of the blocks in float8, through torchao, on cards that have it.")
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        "What the backward pass computes again instead of keeping it: nothing, all but products and attention, whole blocks.",
        affects_output=False,
    )
    offload: bool = setting(
        False, "Keep sharded weights and optimizer states in the host's memory (CUDA).", affects_output=False
    )
    compile: Literal["auto"] | bool = setting(
        "auto", "Compile the blocks one by one. auto: if the time it saves, measured, exceeds the time it takes."
    )
    threads: int | None = setting(
        None, "Processor threads; absent: every usable core. Another number gives other roundings.", affects_output=False, gt=0
    )
    checkpoint_minutes: float = setting(1.0, "Time between checkpoints.", unit="minutes", affects_output=False, gt=0)
    checkpoint_every: int | None = setting(
        None,
        "A checkpoint at multiples of so many steps stays, and so does the first.",
        unit="steps",
        affects_output=False,
        gt=0,
    )
    checkpoint_background: Literal["auto"] | bool = setting(
        "auto", "Write checkpoints from a copy while training goes on. auto: on a GPU.", affects_output=False
    )
    log_every: int = setting(1, "Steps between lines of metrics.jsonl.", unit="steps", affects_output=False, gt=0)
    profile: ProfileConfig | None = setting(
        None,
        "Steps of which a trace, a table of operators and, on a GPU, a snapshot of the memory are left in profile/.",
        affects_output=False,
    )
    track: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        description="Trackers that get the records of metrics.jsonl as well.", affects_output=False, default_factory=list
    )
    track_project: str = setting("bessemer", "Name of the project in wandb and trackio.", affects_output=False)
    observe_every: int = setting(
        100,
        "Steps between looks at norms by layer, outliers, losses by source and memory, each for the price of one more forward "
        "pass; the last step is looked at too. 0: never.",
        unit="steps",
        affects_output=False,
        ge=0,
    )

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if name not in OPTIMIZERS and not is_user_function(name):
            raise ValueError(f"{name!r} is neither an optimizer nor file.py:function{nearest(name, list(OPTIMIZERS))}")
        return name

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.width_base is not None and self.optimizer in ("sgd", "adafactor"):
            raise ValueError(
                f"width_base is for muon, adamw, lion and your own, whose steps have a size of their own: not {self.optimizer}"
            )
        return self

    @model_validator(mode="after")
    def _check_saved(self) -> Self:
        if self.save == "ema" and self.ema is None:
            raise ValueError("save: ema needs an average: set ema, as in ema: 0.999")
        return self

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
                    f"activation_checkpointing: selective computes a block again once, and {schedule} needs it twice; set none "
                    "or full, or another pipeline_schedule"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _replace_default_lengths(cls, values: Any) -> Any:
        """A length in steps or tokens takes the place of the share that is its default."""
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
                    raise ValueError(
                        f"{given[0]} is for schedule: wsd, and {self.schedule} has no decay of its own: leave it out"
                    )
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

    def warmup_length(self, steps: int) -> float:
        """Steps of the warm-up in a run of `steps`."""
        return self._length(steps, self.warmup_fraction, self.warmup_steps, self.warmup_tokens)

    def decay_length(self, steps: int) -> float:
        """Steps of the decay that a run of `steps` ends with; 0 where the schedule has none of its own."""
        return self._length(steps, self.decay_fraction, self.decay_steps, self.decay_tokens)

    def _length(self, steps: int, fraction: float | None, number: int | None, tokens: int | None) -> float:
        if fraction is not None:
            return fraction * steps
        return float(number or 0) if tokens is None else tokens / (self.batch_size * self.context_length)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents that must not see each other, which costs an explicit attention mask."""
        return False

    @property
    def settled(self) -> bool:
        """Whether nothing is left to measure before training."""
        return self.dtype != "auto" and self.compile != "auto"


class PretrainConfig(LoopConfig):
    """The stage `pretrain`: next-token prediction on token shards. Exactly one of steps, tokens and minutes."""

    init_from: str | None = setting(
        None,
        "RUN@STEP, as in runs/quickstart@1200 or runs/quickstart@last: start from that checkpoint's weights, optimizers and "
        "step, and go on to `steps`. So a finished run is prolonged, or a decay is branched off one that has not decayed yet.",
    )
    loss: str | None = setting(
        None,
        "A loss of your own, file.py:function: from the model and a batch to the mean over the batch's targets; absent: "
        "cross-entropy of the next token.",
        code=True,
    )

    tokens: int | None = setting(None, "Tokens to train on; rounded up to whole steps.", unit="tokens", gt=0)
    minutes: float | None = setting(
        None,
        "Time to train for, start-up and validation included; the speed is measured once and the steps are kept in the run's "
        "lock file.",
        unit="minutes",
        gt=0,
    )
    packing: Literal["stream", "documents"] = setting(
        "stream",
        "stream: rows are windows of the stream of all documents, and a document sees those before it; documents: rows are "
        "filled with whole documents that do not see each other.",
    )
    fim_rate: float = setting(0.0, "Share of the documents that are rearranged for fill-in-the-middle.", ge=0, le=1)
    fim_spm_rate: float = setting(
        0.5, "Of these, the share with the suffix first (SPM) instead of the prefix (PSM).", ge=0, le=1
    )
    fim_sources: list[str] = setting(description="Sources whose documents may be rearranged; empty: all.", default_factory=list)
    anneal_fraction: float | None = setting(
        None,
        "Share of the steps, at the end, that read the second mixture, where the corpus has one (select.anneal); absent: those "
        "of the decay.",
        ge=0,
        le=1,
    )
    evaluate_every: int | None = setting(
        None, "Steps between validations; absent: an eighth of the run. The last step is always validated.", unit="steps", gt=0
    )
    evaluate_tokens: int = setting(32_768, "Tokens of the validation split that are read each time.", unit="tokens", gt=0)
    sample_prompts: list[str] = setting(
        description="Prompts that the model continues at several points of training, for the report.",
        default_factory=lambda: ["Return the", "This function", "class ", "Parameters\n"],
    )
    sample_points: int = setting(4, "At how many points of training the prompts are continued, the end included.", ge=0)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents that must not see each other."""
        return self.packing == "documents"

    @property
    def settled(self) -> bool:
        """Whether nothing is left to measure before training, the number of steps included."""
        return super().settled and self.steps is not None

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, value: str | None) -> str | None:
        if value is not None and not is_user_function(value):
            raise ValueError(f"{value!r} is no loss; write file.py:function")
        return value

    @model_validator(mode="after")
    def _check_z_loss(self) -> Self:
        if self.loss is not None and self.z_loss:
            raise ValueError("z_loss is part of the usual loss: where loss is your own, add it there, and leave z_loss out")
        return self

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and minutes, not {' and '.join(given) or 'none'}")
        return self


def check_compiler() -> None:
    """Raise ConfigError when there is no C++ compiler, with which PyTorch builds its compiled blocks."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise ConfigError("compile: true needs a C++ compiler (g++ or clang++) and there is none; install one, or say false")
