"""Settings of a fine-tuning with defaults for a real model. Imports no PyTorch."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting
from bessemer.posttraining.config import TRUNCATE, Truncate

#: Ways to tune, from the one that needs most memory to the one that needs least.
Method = Literal["full", "lora", "qlora"]
#: Peak learning rate of a real model whose weights are all tuned.
FULL_LEARNING_RATE = 1e-5


class FinetuneConfig(Config):
    """How a model is fine-tuned on questions and answers."""

    method: Literal["auto", "full", "lora", "qlora"] = setting(
        "auto",
        "full: all weights; lora: a low-rank adapter beside them; qlora: beside weights of 4 bits; auto: the first of these "
        "that memory holds.",
    )
    also: dict[str, float] = setting(
        default_factory=dict, description="Further files of questions and answers, and how often each comes in a pass."
    )
    prompt_column: str | None = setting(None, "Column of the questions; absent: found by its name.")
    answer_column: str | None = setting(None, "Column of the answers; absent: found by its name.")
    epochs: float = setting(2.0, "Passes over the data.", gt=0)
    learning_rate: float | None = setting(None, "Peak learning rate; absent: 1e-5 for full, 2e-4 for an adapter.", gt=0)
    rank: int = setting(16, "Rank of an adapter.", gt=0)
    context_length: int | None = setting(
        None, "Tokens of a row; absent: those of the longest conversation, at most 2,048 and the model's context.", gt=1
    )
    batch_size: int | None = setting(None, "Rows of a batch; absent: as many as hold eight conversations.", gt=0)
    truncate: Truncate = setting("drop", TRUNCATE)
    held_out: float = setting(0.1, "Share of the data that is held out, to see whether the model got better.", gt=0, lt=1)
    merge: bool = setting(
        False, "Also write model/, the weights with the adapter merged into them; at any time later too.", affects_output=False
    )
