"""Settings of the stage `embedder`. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import nearest, setting
from bessemer.core.records import TABLES, is_table
from bessemer.posttraining.data.made import QUESTIONS
from bessemer.training.adapter_config import TuningConfig

#: Raised when the same settings and inputs give other weights than before.
EMBEDDER_VERSION = 1


class EmbedderConfig(TuningConfig):
    """The stage `embedder`: a model learns to give a question and the passage that answers it near vectors. The defaults suit a
    real model."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(
        description=f"{QUESTIONS}, of a stage above, or files of rows {{question, text, negatives}}: the passage that answers "
        "the question, and passages that do not, as `bessemer questions --negatives` writes them.",
        min_length=1,
    )
    temperature: float = setting(
        0.05, "What cosines are divided by: the smaller, the more the nearest wrong passages count.", gt=0, le=1
    )
    negatives: int = setting(4, "Most passages of a row's own negatives that are learnt from, the first ones.", ge=0, le=32)
    validation_share: float = setting(0.05, "Fraction of the questions that is held out.", ge=0, lt=1)
    epochs: float = setting(1.0, "Passes over the questions; without effect when steps is given.", gt=0)

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(2e-5, "Peak learning rate.", gt=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay of matrices.", ge=0)
    context_length: int = setting(
        2048, "Tokens of a row: its questions are compared with all of its passages, so that a longer row is harder.", gt=1
    )
    warmup_fraction: float | None = setting(
        0.1, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.9, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several texts that do not attend to each other."""
        return True

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != QUESTIONS and not is_table(name):
                raise ValueError(f"{name!r} is no file of rows ({', '.join(TABLES)}){nearest(name, [QUESTIONS])}")
        return names

    @field_validator("tasks")
    @classmethod
    def _no_tasks(cls, names: list[str]) -> list[str]:
        if names:
            raise ValueError("an embedder gives vectors, so it can answer no tasks")
        return names

    @model_validator(mode="after")
    def _check_trained(self) -> Self:
        if self.adapter is not None and not self.adapter.merge:
            raise ValueError("adapter.merge: false: an embedder is opened whole; leave it out")
        if self.keep_better is not None:
            raise ValueError("keep_better compares models that answer; leave it out")
        if self.z_loss:
            raise ValueError("z_loss applies to next-token losses only; remove it")
        return self
