"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting

#: Raised whenever the stage's output changes (golden outputs in the tests).
EVALUATE_VERSION = 2

Baseline = Literal["witten_bell_5gram", "witten_bell_6gram", "xz"]


class EvaluateConfig(Config):
    """What is measured, on which models, beside which baselines."""

    models: list[str] = setting(default_factory=list, description="stages whose models are measured; empty: all in the recipe")
    tasks: list[Literal["docs_questions"]] = setting(
        default_factory=lambda: ["docs_questions"], description="tasks that the models answer by generation"
    )
    baselines: list[Baseline] = setting(
        default_factory=lambda: ["witten_bell_5gram", "witten_bell_6gram", "xz"],
        description="what the bits per byte stand beside: n-gram models of the same training bytes, a file compressor",
    )
    context_length: int = setting(
        256, "window in which bits per byte are measured; the length that the model was trained on", unit="tokens", ge=1
    )
    max_tokens: int | None = setting(
        250_000,
        "score the first held-out documents, in the order of ids, that fit in so many; baselines see the same; null: all",
        unit="tokens",
        ge=1,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "type of the products that bits per byte are computed with; auto: bfloat16 where the device has instructions for it, "
        "as in training, else float32",
    )
    batch_size: int = setting(32, "windows computed at once", unit="windows", affects_output=False, ge=1)
    questions: int = setting(200, "questions per set, held-in and held-out, at most", unit="questions", ge=1)
    max_new_tokens: int = setting(64, "length at which an answer is cut", unit="tokens", ge=1)
    baseline_bytes: int = setting(
        100_000_000, "n-gram models are trained on at most this much, in the order of ids", unit="bytes of UTF-8", ge=1
    )
