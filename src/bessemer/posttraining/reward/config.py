"""Settings of the stage `reward`."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import setting
from bessemer.posttraining.made import checked_pairs
from bessemer.training.adapter_config import TuningConfig

#: Raised when the same settings and inputs give other weights than before.
REWARD_VERSION = 6


class RewardConfig(TuningConfig):
    """The stage `reward`: a reward model from pairs of a chosen and a rejected answer. The defaults suit a real model."""

    shorthand: ClassVar[str | None] = "data"
    # ten times that of full tuning, as elsewhere
    adapter_learning_rate: ClassVar[float] = 1e-4

    data: list[str] = setting(
        description="Pairs: files of rows, as JSON lines, JSON, CSV or Parquet: {prompt, chosen, rejected}, in messages or "
        "texts; made/mismatched, of the conversations of sft; made/preferences and made/honesty, of stages above. A row "
        "may have "
        "a margin, by how much the one is better, a confidence, how probably it is, and a weight.",
        min_length=1,
    )
    centering: float = setting(
        0.0, "Weight of the mean squared sum of a pair's rewards, which holds rewards around 0 (0.01 is usual).", ge=0
    )
    validation_share: float = setting(
        0.05, "Fraction of the prompts whose pairs are held out; a prompt is on one side with all its pairs.", ge=0, lt=1
    )
    epochs: float = setting(1.0, "Passes over the pairs; without effect when steps is given.", gt=0)

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(1e-5, "Peak learning rate.", gt=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay of matrices.", ge=0)
    context_length: int = setting(
        1024, "Tokens of a row, which holds whole pairs: an answer with its prompt at most half.", gt=1
    )
    warmup_fraction: float | None = setting(
        0.1, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.9, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several conversations that do not attend to each other."""
        return True

    @property
    def scores(self) -> bool:
        """Whether the model that is trained has a scalar head, `score`, in place of its language head."""
        return True

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        return checked_pairs(names)

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        if self.adapter is not None and not self.adapter.merge:
            raise ValueError("adapter.merge: false: a reward model is its adapter and its head, merged in model/; leave it out")
        if self.z_loss:
            raise ValueError("z_loss is of losses of the next token, which a reward model has not; leave it out")
        return self

    @field_validator("tasks")
    @classmethod
    def _no_tasks(cls, names: list[str]) -> list[str]:
        if names:
            raise ValueError("a reward model writes no text, so it can answer no tasks")
        return names
