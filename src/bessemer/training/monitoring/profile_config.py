"""Settings of the profiler. Imports no PyTorch."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from bessemer.core.config import Config, setting


class ProfileConfig(Config):
    """Steps that the profiler records."""

    steps: str = setting(
        description="The first and the last step, counted from 1, as in 10-12; or a single one.", pattern=r"^\d+(-\d+)?$"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not 1 <= self.range.start < self.range.stop:
            raise ValueError(f"steps: {self.steps!r} is no range of steps, which are counted from 1")
        return self

    @property
    def range(self) -> range:
        """The steps, as numbers."""
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)
