"""Settings of the stage `honesty`. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar

from bessemer.core.config import Config, setting

#: Raised when the same settings and inputs give other pairs than before.
HONESTY_VERSION = 2


class HonestyConfig(Config):
    """The stage `honesty`: pairs from documentation, of questions that it answers and of questions that it does not."""

    shorthand: ClassVar[str | None] = "pairs"

    pairs: int = setting(400, "Most pairs.", gt=0)
    unknown_share: float = setting(
        0.5, "Share of the pairs whose question no document answers; of these alone a model learns to know nothing.", gt=0, lt=1
    )
    unsure: list[str] = setting(
        default_factory=lambda: ["I don't know.", "I don't know of such a thing.", "I can't say: I know nothing about it."],
        description="What is said where nothing is known, one of these drawn for each pair.",
        min_length=1,
    )
