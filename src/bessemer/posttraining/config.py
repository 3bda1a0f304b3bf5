"""Settings of post-training stages."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from bessemer.core.config import nearest, setting
from bessemer.training.adapter_config import TuningConfig

#: Raised when the same settings and inputs give other weights or conversations than before (golden outputs in the tests).
SFT_VERSION = 5

#: Data made from the run's own documents: its name in `data`.
DOCS_QUESTIONS = "made/docs_questions"


class SFTConfig(TuningConfig):
    """The stage `sft`: supervised fine-tuning on conversations, with the loss on the assistant's messages."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(
        description=f"Conversations: {DOCS_QUESTIONS}, or files of JSON lines like {{messages: [{{role, content}}, …]}}.",
        default_factory=lambda: [DOCS_QUESTIONS],
        min_length=1,
    )
    train_questions: int = setting(600, f"Questions of {DOCS_QUESTIONS} to train on.", gt=0)
    validation_questions: int = setting(200, f"Questions of {DOCS_QUESTIONS} about documents held out, never trained on.", ge=0)
    validation_share: float = setting(0.05, "Fraction of a file's conversations that is held out.", ge=0, lt=1)
    epochs: float = setting(15.0, "Passes over the conversations; without effect when steps is given.", gt=0)

    learning_rate: float = setting(2e-3, "Peak learning rate.", gt=0)
    warmup_fraction: float | None = setting(
        0.05, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.5, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several conversations that do not attend to each other."""
        return True

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != DOCS_QUESTIONS and not name.endswith(".jsonl"):
                raise ValueError(f"{name!r} is neither a .jsonl file nor made data{nearest(name, [DOCS_QUESTIONS])}")
        return names
