"""What a request may ask of the engine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bessemer.core.config import Config, setting


class SamplingParams(Config):
    """How one request's tokens are chosen and when they end."""

    max_tokens: int = setting(256, "at most so many new tokens; fewer where the context ends", unit="tokens", ge=1)
    temperature: float = setting(1.0, "divides the logits; 0 takes the likeliest token every time", ge=0, allow_inf_nan=False)
    top_k: int = setting(0, "sample from so many likeliest tokens; 0: from all", unit="tokens", ge=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that together reach this probability", gt=0, le=1)
    seed: int | None = setting(None, "the same seed gives the same text; none: another text every time")
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        default_factory=list, description="texts before which the answer ends"
    )
    ignore_eos: bool = setting(False, "go on after the end token, to measure speed")
