"""Rewards of a completion's length and of what it repeats, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bessemer.posttraining.rewards.config import LengthReward, OverlongReward, RepetitionReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction


def length_reward(settings: LengthReward, context: RewardContext) -> RewardFunction:
    """1 inside the range, falling linearly to 0 at `falloff` tokens beyond it."""

    def of(length: int) -> float:
        beyond = max(settings.at_least - length, 0 if settings.at_most is None else length - settings.at_most, 0)
        return max(0.0, 1 - beyond / settings.falloff)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [of(len(ids)) for ids in completion_ids]

    return reward


def overlong_reward(settings: OverlongReward, context: RewardContext) -> RewardFunction:
    """Soft overlong punishment (DAPO; Yu et al. 2025, eq. 13): 0 for L ≤ Lmax − Lc, then (Lmax − Lc − L) / Lc, at least −1."""
    free = settings.longest - settings.band

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [max(-1.0, min(0.0, (free - len(ids)) / settings.band)) for ids in completion_ids]

    return reward


def repetition_reward(settings: RepetitionReward, context: RewardContext) -> RewardFunction:
    """−(1 − different runs / runs) of `run` tokens (Yeo et al. 2025, arXiv 2502.03373); 0 of a shorter completion."""

    def of(ids: Sequence[int]) -> float:
        runs = [tuple(ids[start : start + settings.run]) for start in range(len(ids) - settings.run + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [of(ids) for ids in completion_ids]

    return reward
