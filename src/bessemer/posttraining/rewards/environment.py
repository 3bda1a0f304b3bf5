"""What the environment of an episode said it was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bessemer.posttraining.rewards.config import EnvironmentReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction

#: Columns of an episode: the sum of its rewards, and why it broke off.
TOTAL, FAILURE = "environment_total", "environment_failure"


def environment_reward(settings: EnvironmentReward, context: RewardContext) -> RewardFunction:
    """The sum of an episode's rewards; RuntimeError for one that broke off."""

    def reward(
        completions: Sequence[Any],
        environment_total: Sequence[float] | None = None,
        environment_failure: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        if environment_total is None:
            return [None for _ in completions]
        failure = next(filter(None, environment_failure or ()), None)
        if failure is not None:
            raise RuntimeError(failure)
        return list(environment_total)

    return reward
