"""Settings of the critic of PPO. Imports no PyTorch."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting


class CriticConfig(Config):
    """A model with a scalar head, which learns what reward a completion will still get (Schulman et al. 2017)."""

    start: Literal["policy", "reward_model"] = setting(
        "policy", "The weights it starts from: the policy's, with a new head, or those of the stage `reward` above."
    )
    learning_rate_factor: float = setting(
        10.0,
        "Its learning rates are this many times the policy's; 1 where none is given and the policy trains an adapter.",
        gt=0,
    )
    weight: float = setting(
        0.1, "Weight of its loss: Adam's update hardly depends on it, the clip of its own gradients does.", gt=0
    )
    clip: float | None = setting(0.2, "A value moves at most so far from where the rollout found it; null: anywhere.", gt=0)
    discount: float = setting(1.0, "γ: what a reward one token later is worth.", gt=0, le=1)
    decay: float = setting(
        0.95, "λ of generalised advantage estimation: 0 trusts the critic alone, 1 the rewards alone.", ge=0, le=1
    )
