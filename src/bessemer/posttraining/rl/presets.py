"""Methods by name: the settings of the stage `rl` that make each, all of which can be given otherwise. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLIP = {"loss": "clip", "clip_low": 0.2, "clip_high": 0.2}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Schulman et al. 2017, with the settings of TRL's trainer for language models
    "ppo": {
        "critic": {},
        "aggregation": "token_mean",
        **_CLIP,
        "kl": "reward",
        "beta": 0.05,
        "group_size": 1,
        "rollout_epochs": 4,
    },
    # Guo et al. 2024, arXiv 2402.04792
    "online_dpo": {"pair_loss": "sigmoid", "beta": 0.1, "group_size": 2},
    # Shao et al. 2024, with TRL's β of 0
    "grpo": {"advantage": "grpo", "aggregation": "sequence_mean", **_CLIP},
    # Liu et al. 2025
    "dr_grpo": {"advantage": "group_mean", "aggregation": "constant", **_CLIP},
    # Yu et al. 2025; the punishment of long answers is the reward `overlong`
    "dapo": {"advantage": "grpo", "aggregation": "token_mean", **_CLIP, "clip_high": 0.28, "dynamic_sampling": True},
    # Zheng et al. 2025
    "gspo": {"advantage": "grpo", "aggregation": "sequence_mean", "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax-M1, 2025, with ScaleRL's bound of 5
    "cispo": {"advantage": "grpo", "aggregation": "token_mean", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    # Khatri et al. 2025
    "scale_rl": {
        "advantage": "centred_deviation",
        "aggregation": "prompt_mean",
        "loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "dynamic_sampling": True,
    },
    # arXiv 2511.20347
    "sapo": {"advantage": "grpo", "aggregation": "sequence_mean", "loss": "sapo"},
    # Ahmadian et al. 2024, as TRL has it
    "rloo": {
        "advantage": "rloo",
        "aggregation": "sequence_mean",
        **_CLIP,
        "level": "sequence_sum",
        "kl": "reward",
        "beta": 0.05,
    },
    # Hu et al. 2025
    "reinforce_pp": {"advantage": "reinforce_pp", "aggregation": "token_mean", **_CLIP, "kl": "reward", "beta": 0.01},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "aggregation": "token_mean", **_CLIP},
    # Liu et al. 2025, arXiv 2508.08221
    "lite_ppo": {"advantage": "batch_deviation", "aggregation": "token_mean", **_CLIP},
}
