"""Settings of the stage `distillation`, and its losses by name. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.posttraining.data.made import ON_BAD_ROW, PLACES, TRUNCATE, OnBadRow, Truncate
from bessemer.training.adapter_config import TuningConfig

if TYPE_CHECKING:
    from bessemer.posttraining.distillation.losses import DistillationLoss


#: Plain tuning on the teacher's answers, without its distributions.
CROSS_ENTROPY = "cross_entropy"
#: The policy gradient on the student's own samples.
POLICY_GRADIENT = "policy_gradient"

_LOSSES = "bessemer.posttraining.distillation.losses"

DISTILLATION_LOSSES: Registry[DistillationLoss] = Registry(
    "distillation loss",
    "bessemer.distillation_losses",
    [
        Plugin("forward_kl", "KL(teacher ‖ student): the student covers all that the teacher may say", f"{_LOSSES}:forward_kl"),
        Plugin("reverse_kl", "KL(student ‖ teacher): the student says what the teacher finds likely", f"{_LOSSES}:reverse_kl"),
        Plugin("jsd", "the generalised Jensen–Shannon divergence of GKD, between the two", f"{_LOSSES}:jsd"),
        Plugin("top_k", "forward KL of the teacher's likeliest tokens and of the rest as one", f"{_LOSSES}:top_k"),
    ],
)


#: Raised when the same settings and inputs give other weights than before.
DISTILLATION_VERSION = 5


class TeacherServerConfig(Config):
    """A server that scores tokens, by OpenAI's `/v1/completions` with `echo` and `logprobs`: ours, vLLM, SGLang."""

    url: str = setting(description="address of the API with its version, such as http://127.0.0.1:8000/v1")
    model: str | None = setting(None, "the teacher's name there; absent: the first of its list")
    key_variable: str = setting(
        "", "environment variable that holds the key of the API; empty: it needs none", affects_output=False
    )
    workers: int = setting(8, "requests at once, of each process", affects_output=False, ge=1)
    timeout: float = setting(120.0, "timeout of a request", unit="seconds", affects_output=False, gt=0)
    attempts: int = setting(5, "most attempts of a request that fails for a temporary reason", affects_output=False, ge=1)


class DistillationConfig(TuningConfig):
    """The stage `distillation`: a model learns from another one. The defaults suit a real model."""

    shorthand: ClassVar[str | None] = "data"

    teacher: str | None = setting(
        None, "Folder of the teacher; absent: the model of the stage that `from: {teacher: STAGE}` names."
    )
    teacher_server: TeacherServerConfig | None = setting(
        None,
        "A server of the teacher instead of a folder: an address, or settings. Only with answers: student and loss: "
        "policy_gradient, which need only the log-probabilities of the student's tokens.",
    )
    data: list[str] = setting(
        description="Of " + PLACES + ": conversations and prompts with answers as in sft; "
        "where answers are sampled, prompts are enough. Empty: the text of the run's token shards, learnt whole.",
        default_factory=list,
    )
    answers: Literal["data", "teacher", "student"] = setting(
        "data",
        "Answers to learn from. data: those of the data; teacher: sampled by the teacher before training; student: sampled by "
        "the student at each step (on-policy).",
    )
    loss: str = setting(
        "forward_kl",
        "Of a token: forward_kl, reverse_kl, jsd, top_k, divergences from the teacher's distribution; cross_entropy, of the "
        "teacher's answers, which may have another tokenizer; policy_gradient, of the student's, with minus the log-ratio as "
        "advantage; or one that an installed package adds (entry points bessemer.distillation_losses).",
        plugins="bessemer.distillation_losses",
    )
    temperature: float = setting(
        1.0, "Temperature of both distributions in a divergence; the loss is not scaled by its square.", gt=0
    )
    beta: float = setting(0.5, "jsd: 0 is the forward, 1 the reverse KL divergence, as in GKD.", ge=0, le=1)
    top_k: int = setting(
        64,
        "top_k: number of the teacher's likeliest tokens that count separately; all others count as one.",
        unit="tokens",
        ge=1,
    )
    next_token_weight: float = setting(
        0.0, "Weight of the targets' mean cross-entropy, which is added to the divergence.", ge=0
    )
    baseline: Literal["mean", "none"] = setting(
        "mean",
        "policy_gradient: baseline that is subtracted from advantages, the batch's mean or none; without it the gradient is "
        "noisier, with the same mean.",
    )

    samples_per_prompt: int = setting(1, "Sampled answers for each prompt.", unit="answers", ge=1)
    max_tokens: int = setting(256, "Longest sampled answer.", unit="tokens", ge=1)
    sampling_temperature: float = setting(
        1.0, "Temperature of sampling; with answers: student also of the log-probabilities of policy_gradient.", gt=0
    )
    cpu_kernels: Literal["auto", "on", "off"] = setting("auto", "Whether sampling uses compiled kernels, as in rl.")
    batch_size: int = setting(8, "Rows of a batch; where the student samples, its answers for one update.", gt=0)
    validation_share: float = setting(
        0.05, "Fraction of the prompts that are held out; all answers to a prompt are on the same side.", ge=0, lt=1
    )
    truncate: Truncate = setting("drop", TRUNCATE)
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    validation_limit: int = setting(
        100, "Most held-out prompts that the student answers at each validation, for `validation_reverse_kl`.", ge=0
    )
    evaluate_tokens: int = setting(
        32_768, "Without data: tokens of the validation split that are read at each validation.", unit="tokens", gt=0
    )
    epochs: float = setting(1.0, "Passes over the rows, or the prompts; without effect when steps is given.", gt=0)

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(2e-5, "Peak learning rate.", gt=0)
    context_length: int = setting(
        1024, "Tokens of a row, and the most tokens of a prompt with its sampled answer.", unit="tokens", gt=1
    )
    warmup_fraction: float | None = setting(
        0.05, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.5, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    def output_settings(self) -> dict[str, Any]:
        """As of `Config`; without a teacher's server where there is none, so that stages that are made keep their keys."""
        settings = super().output_settings()
        if self.teacher_server is None:
            del settings["teacher_server"]
        return settings

    @property
    def packed(self) -> bool:
        """Whether rows hold several answers that do not attend to each other."""
        return bool(self.data)

    @property
    def groups(self) -> int:
        """Prompts that the student answers at a step."""
        return self.batch_size // self.samples_per_prompt

    @field_validator("teacher_server", mode="before")
    @classmethod
    def _addressed(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        if name in (CROSS_ENTROPY, POLICY_GRADIENT):
            return name
        try:
            DISTILLATION_LOSSES.find(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="before")
    @classmethod
    def _suit_sampling(cls, values: Any) -> Any:
        """Rows of the student's answers have a new length at each step, and float32 is what the engine computes in."""
        if isinstance(values, Mapping) and values.get("answers") == "student":
            return {"dtype": "float32", "compile": False, **values}
        return values

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if self.answers != "data" and not self.data:
            raise ValueError(f"answers: {self.answers} needs prompts; name files of them in data")
        if self.loss == CROSS_ENTROPY and self.answers != "teacher":
            raise ValueError("loss: cross_entropy is of the teacher's answers: set answers: teacher; of other data it is sft")
        if self.loss == POLICY_GRADIENT and self.answers != "student":
            raise ValueError("loss: policy_gradient is of the student's own answers: set answers: student")
        if self.loss in (CROSS_ENTROPY, POLICY_GRADIENT) and self.next_token_weight:
            raise ValueError(f"next_token_weight: beside a divergence, not beside {self.loss}")
        if self.z_loss and self.loss != CROSS_ENTROPY:
            raise ValueError(f"z_loss: beside cross_entropy, not beside {self.loss}")
        if self.answers != "data" and self.max_tokens >= self.context_length:
            raise ValueError(
                f"max_tokens {self.max_tokens:,} leaves no room for a prompt in context_length {self.context_length:,}"
            )
        return self

    @model_validator(mode="after")
    def _check_student(self) -> Self:
        if self.answers != "student":
            return self
        if self.next_token_weight:
            raise ValueError("next_token_weight: the student's own answers are no targets to imitate; leave it out")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of samples_per_prompt {self.samples_per_prompt}")
        self.check_sampled_adapter(self.cpu_kernels)
        if self.batch_size_warmup is not None:
            raise ValueError("batch_size_warmup: the student answers as many prompts at each step; leave it out")
        if self.early_stopping_patience is not None or self.save == "best":
            raise ValueError("early_stopping_patience and save: best go by a validation loss, which answers: student has not")
        return self

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.teacher_server is None:
            return self
        if self.teacher is not None:
            raise ValueError("teacher and teacher_server: there is one teacher; leave one of them out")
        if self.answers != "student" or self.loss != POLICY_GRADIENT:
            raise ValueError(
                "teacher_server: a server gives log-probabilities of single tokens, which is what answers: student and loss: "
                "policy_gradient learn from; for whole distributions name a folder: teacher"
            )
        if self.sampling_temperature != 1:
            raise ValueError("teacher_server: servers give log-probabilities at temperature 1; set sampling_temperature: 1")
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        split = next((axis for axis in ("context", "tensor", "pipeline", "expert") if getattr(self.parallel, axis) > 1), None)
        if split is not None:
            raise ValueError(f"parallel.{split}: distillation runs under data_replicate and data_shard alone")
        return self
