"""Settings of the classifier's training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from bessemer.core.config import Config, setting


class ClassifierConfig(Config):
    """How a classifier is trained."""

    retired: ClassVar[Mapping[str, str]] = {"shortest_piece": "min_subword", "longest_piece": "max_subword"}

    name: str = setting("quality", "what a good text is called; its column is `classifier_NAME`", min_length=1)
    word_order: int = setting(2, "longest sequence of words that is a feature", unit="words", ge=1, le=4)
    min_subword: int = setting(3, "shortest subword that is a feature", unit="bytes", ge=1, le=8)
    max_subword: int = setting(
        0, "longest subword that is a feature; 0 for none, which is three times as fast", unit="bytes", ge=0, le=8
    )
    bits: int = setting(18, "the weights are 2^bits numbers of four bytes", ge=8, le=26)
    passes: int = setting(12, "most passes over the examples; the best by held-out loss is kept", ge=1)
    learning_rate: float = setting(0.3, "AdaGrad's step size", gt=0)
    l2: float = setting(1e-6, "pull of every weight towards zero", ge=0)
    prior: float = setting(0.5, "share of good texts that probabilities are calibrated for", gt=0, lt=1)
    seed: int = setting(0, "decides the order of examples", ge=0)
