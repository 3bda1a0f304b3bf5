"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting

#: Raised whenever the stage's output changes (golden outputs in the tests).
EVALUATE_VERSION = 5

#: The task of questions about the documentation that SFT learnt from, which the stage has by itself.
DOCS_QUESTIONS = "docs_questions"

Baseline = Literal["witten_bell_5gram", "witten_bell_6gram", "xz"]


class EvaluateConfig(Config):
    """Models, tasks and baselines of an evaluation."""

    models: list[str] = setting(default_factory=list, description="stages whose models are evaluated; empty: all in the recipe")
    tasks: list[str] = setting(
        default_factory=lambda: ["docs_questions"],
        description="tasks that the models answer by generation: docs_questions, from SFT's conversations, and tasks by name "
        "or by task file, such as sums_held_out or charts.yaml",
    )
    tasks_folder: str | None = setting(
        None,
        "folder of the tasks' data, or the file of a task about pictures; none: that of the task file",
        affects_output=False,
    )
    baselines: list[Baseline] = setting(
        default_factory=lambda: ["witten_bell_5gram", "witten_bell_6gram", "xz"],
        description="baselines of the bits per byte: n-gram models of the same training bytes, a file compressor",
    )
    context_length: int = setting(256, "window of the bits per byte; the context length of training", unit="tokens", ge=1)
    stride: int | None = setting(
        None,
        "tokens from one window of the bits per byte to the next. With less than a window, each token is predicted from at "
        "least the difference, at the cost of more work. none: windows do not overlap",
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
        "windows computed at once; none: 8 on a processor, so that a layer's activations fit into its caches, else 64",
        unit="windows",
        affects_output=False,
        ge=1,
    )
    questions: int = setting(200, "most questions of each set, held-in and held-out, and of each task", unit="questions", ge=1)
    max_new_tokens: int = setting(64, "longest answer", unit="tokens", ge=1)
    minutes: float | None = setting(
        None,
        "most time for the evaluation: if a measurement at the start predicts more, fewer tokens are scored and fewer "
        "questions asked, equally for every model. At most half of the models' training time, but 10 s are always allowed. "
        "none: no limit",
        unit="minutes",
        gt=0,
    )
    threads: int | None = setting(
        None,
        "CPU threads for the bits per byte; none: all usable cores, or with `minutes` the number that is measured to be "
        "fastest. Other numbers round differently",
        ge=1,
    )
    baseline_bytes: int = setting(
        100_000_000, "most text that n-gram models are trained on, in the order of ids", unit="bytes of UTF-8", ge=1
    )

    @property
    def resolved(self) -> bool:
        """Whether its size is not left to a measurement."""
        return self.minutes is None
