"""Settings of mixtures: how often the documents of each source are read in training."""

from __future__ import annotations

from pydantic import field_validator

from bessemer.core.config import Config, setting
from bessemer.data.config.stage import DataConfig


class MixConfig(Config):
    """How often the documents of each source are read in training; by `epochs`, else `weights`, else `temperature`."""

    epochs: dict[str, float] = setting(
        default_factory=dict, description="how often a source is read: 2, or 0.5 for half of its documents; others once"
    )
    weights: dict[str, float] = setting(
        default_factory=dict, description="a source's share of the text, in any unit; others are left out"
    )
    temperature: float = setting(1.0, "shares are sizes to the power 1 / temperature: above 1 lifts small sources", gt=0)
    max_epochs: float = setting(4.0, "no source is read more often to reach its share", gt=0)
    max_bytes: int | None = setting(None, "text to be read in all", unit="bytes", ge=1)

    @field_validator("epochs", "weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not 0 <= number < 1000:
                raise ValueError(f"{name}: {number:g} is not between 0 and 1000")
        return value


class MixedConfig(DataConfig):
    """What a stage says that leaves the documents as they are read in training."""

    mix: MixConfig | None = setting(None, "how often each source is read; once when absent")
    anneal: MixConfig | None = setting(None, "a second mixture, for the last phase of training")
