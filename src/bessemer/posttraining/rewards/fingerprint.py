"""What the output of a stage depends on by its rewards. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bessemer.posttraining.chat_models.files import chat_models_fingerprint, model_place, place_fingerprint
from bessemer.posttraining.rewards.config import ModelReward, RewardModelReward, RewardSettings


def rewards_fingerprint(rewards: Sequence[RewardSettings], folder: Path) -> list[dict[str, str]]:
    """Hashes of the files of those models of rewards that lie on this machine. Raises ConfigError for one that does not."""
    judges = chat_models_fingerprint([reward.judge for reward in rewards if isinstance(reward, ModelReward)], folder)
    scorers = [reward.model for reward in rewards if isinstance(reward, RewardModelReward) and reward.model is not None]
    return [*judges, *(place_fingerprint(model_place(model, folder)) for model in scorers)]
