"""Settings of the stage `pretrain`. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import setting
from bessemer.core.usercode import is_user_function
from bessemer.training.config import LoopConfig

#: Raised when the same settings and inputs give other weights than before (golden outputs in the tests).
PRETRAIN_VERSION = 6


class PretrainConfig(LoopConfig):
    """The stage `pretrain`: next-token prediction on token shards. Exactly one of steps, tokens and minutes."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (*LoopConfig.alternatives, ("steps", "tokens", "minutes"))

    init_from: str | None = setting(
        None,
        "RUN@STEP, as in runs/quickstart@1200 or runs/quickstart@last: start from the weights, optimizer states and step of "
        "that checkpoint and continue to `steps`, to extend a finished run, or to branch a decay off one without.",
    )
    loss: str | None = setting(
        None,
        "Your own loss, file.py:function: of the model and a batch, the mean over the batch's targets; absent: next-token "
        "cross-entropy.",
        code=True,
    )

    tokens: int | None = setting(None, "Tokens to train on; rounded up to whole steps.", unit="tokens", gt=0)
    minutes: float | None = setting(
        None,
        "Training time, start-up and validation included; throughput is measured once and the number of steps is kept in the "
        "run's lock file.",
        unit="minutes",
        gt=0,
    )
    packing: Literal["stream", "documents"] = setting(
        "stream",
        "stream: rows are windows of the concatenated documents, and a document attends to those before it; documents: rows "
        "are packed with whole documents that do not attend to each other.",
    )
    fim_rate: float = setting(0.0, "Fraction of the documents that are rearranged for fill-in-the-middle.", ge=0, le=1)
    fim_spm_rate: float = setting(
        0.5, "Of these, the fraction with the suffix first (SPM) instead of the prefix (PSM).", ge=0, le=1
    )
    fim_sources: list[str] = setting(description="Sources whose documents may be rearranged; empty: all.", default_factory=list)
    anneal_fraction: float | None = setting(
        None,
        "Fraction of the steps, at the end, that read the second mixture, where the corpus has one (select.anneal); absent: "
        "the steps of the decay.",
        ge=0,
        le=1,
    )
    evaluate_tokens: int = setting(32_768, "Tokens of the validation split that are read each time.", unit="tokens", gt=0)
    sample_prompts: list[str] | None = setting(
        None,
        "Prompts that the model continues at several points of training, for the report; absent: beginnings of texts that are "
        "held out of training; []: none.",
    )
    sample_points: int = setting(4, "Number of points of training at which the prompts are continued, the end included.", ge=0)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents that do not attend to each other."""
        return self.packing == "documents"

    @property
    def time_limit(self) -> float | None:
        """Minutes that the run takes, where its length is given so."""
        return self.minutes

    @property
    def resolved(self) -> bool:
        """Whether no setting is left to autotune before training, the number of steps included."""
        return super().resolved and self.steps is not None

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, value: str | None) -> str | None:
        if value is not None and not is_user_function(value):
            raise ValueError(f"{value!r} is not a loss; write file.py:function")
        return value

    @model_validator(mode="after")
    def _check_z_loss(self) -> Self:
        if self.loss is not None and self.z_loss:
            raise ValueError("z_loss is part of the built-in loss: with your own loss, add it there and leave z_loss out")
        return self

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if not given:
            raise ValueError("give exactly one of steps, tokens and minutes, as in minutes: 4")
        if len(given) > 1:
            ways = " or ".join(f"{name}: {getattr(self, name)}" for name in given)
            raise ValueError(f"give exactly one of steps, tokens and minutes, not {' and '.join(given)}: keep {ways}")
        return self
