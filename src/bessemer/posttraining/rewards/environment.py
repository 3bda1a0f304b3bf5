"""What the environment of an episode said it was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bessemer.posttraining.rewards.config import EnvironmentReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction

#: Columns of an episode: the sum of its rewards, and why it broke off.
TOTAL, FAILURE = "environment_total", "environment_failure"
#: What its failures are counted under.
ENVIRONMENT = "environment"


def environment_reward(settings: EnvironmentReward, context: RewardContext) -> RewardFunction:
    """The sum of an episode's rewards; none of one that broke off, which the sampler leaves out and counts."""

    def reward(
        completions: Sequence[Any],
        environment_total: Sequence[float] | None = None,
        environment_failure: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        if environment_total is None:
            return [None for _ in completions]
        failures = environment_failure or [""] * len(environment_total)
        return [None if failure else total for total, failure in zip(environment_total, failures, strict=True)]

    return reward
