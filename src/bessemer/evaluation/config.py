"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting

#: Raised whenever the stage's output changes (golden outputs in the tests).
EVALUATE_VERSION = 5

Baseline = Literal["witten_bell_5gram", "witten_bell_6gram", "xz"]


class EvaluateConfig(Config):
    """Models, tasks and baselines of an evaluation."""

    models: list[str] = setting(default_factory=list, description="stages whose models are evaluated; empty: all in the recipe")
    tasks: list[str] = setting(
        default_factory=lambda: ["docs_questions"],
        description="tasks that the models answer by generation: docs_questions, of SFT's conversations, and tasks by name "
        "that need no data, as sums_held_out",
    )
    baselines: list[Baseline] = setting(
        default_factory=lambda: ["witten_bell_5gram", "witten_bell_6gram", "xz"],
        description="baselines of the bits per byte: n-gram models of the same training bytes, a file compressor",
    )
    context_length: int = setting(256, "window of the bits per byte; the context length of training", unit="tokens", ge=1)
    stride: int | None = setting(
        None,
        "tokens from a window of the bits per byte to the next: shorter than the window, each token is predicted from at least "
        "the difference, for more work; none: windows do not overlap",
        unit="tokens",
        ge=1,
    )
    max_tokens: int | None = setting(
        250_000,
        "score the first held-out documents, in the order of ids, up to this many tokens in all, baselines too; null: all",
        unit="tokens",
        ge=1,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "dtype of matmuls for the bits per byte; auto: bfloat16 where the device has instructions for it, as in training, else "
        "float32",
    )
    batch_size: int | None = setting(
        None,
        "windows computed at once; none: 8 on a processor, whose caches then hold what a layer makes of them, else 64",
        unit="windows",
        affects_output=False,
        ge=1,
    )
    questions: int = setting(200, "questions at most: per set, held-in and held-out, and per task", unit="questions", ge=1)
    max_new_tokens: int = setting(64, "longest answer", unit="tokens", ge=1)
    minutes: float | None = setting(
        None,
        "most time that the evaluation may take: where a measurement at the start says that it takes longer, fewer tokens are "
        "scored and fewer questions asked, of every model alike; never more than half of the time in which the models were "
        "trained, though 10 s are always allowed. none: all",
        unit="minutes",
        gt=0,
    )
    threads: int | None = setting(
        None,
        "CPU threads for the bits per byte; none: every usable core, with `minutes` the number that is measured to be the "
        "fastest. Another number rounds differently",
        ge=1,
    )
    baseline_bytes: int = setting(
        100_000_000, "most text that n-gram models are trained on, in the order of ids", unit="bytes of UTF-8", ge=1
    )

    @property
    def resolved(self) -> bool:
        """Whether its size is not left to a measurement."""
        return self.minutes is None
