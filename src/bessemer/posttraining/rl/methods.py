"""Methods of `rl` and their parts, by name: what a setting of `config.py` may say.

A preset (`grpo`, `dapo`, …) is a set of values for the settings, each of which can be given otherwise. Advantages, policy
losses, aggregations, corrections and estimators of the divergence are in registries that other packages add to. Imports no
PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.posttraining.rl.advantages import Advantage
    from bessemer.posttraining.rl.losses import Aggregation, Correction, Divergence, PolicyLoss

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
    # Ahmadian et al. 2024, as implemented in TRL
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


_ADVANTAGES, _LOSSES = "bessemer.posttraining.rl.advantages", "bessemer.posttraining.rl.losses"

_OUR_ADVANTAGES: list[Plugin[Advantage]] = [
    Plugin("grpo", "the reward's z-score in its group", f"{_ADVANTAGES}:grpo"),
    Plugin("group_mean", "the reward minus its group's mean, as in Dr. GRPO", f"{_ADVANTAGES}:group_mean"),
    Plugin("batch_deviation", "the group's mean, the deviation of the batch's rewards", f"{_ADVANTAGES}:batch_deviation"),
    Plugin("centred_deviation", "the group's mean, the batch's deviation from such means", f"{_ADVANTAGES}:centred_deviation"),
    Plugin("rloo", "the reward minus the mean of the others in its group", f"{_ADVANTAGES}:leave_one_out"),
    Plugin("reinforce_pp", "of tokens: their rewards to go, whitened over the rollout", f"{_ADVANTAGES}:REINFORCE_PP"),
    Plugin(
        "reinforce_pp_baseline",
        "of tokens, as reinforce_pp, with the group's mean taken off",
        f"{_ADVANTAGES}:REINFORCE_PP_BASELINE",
    ),
]
#: Our own advantages: for these it is known which settings they use.
BUILT_IN_ADVANTAGES = tuple(one.name for one in _OUR_ADVANTAGES)

ADVANTAGES: Registry[Advantage] = Registry("advantage", "bessemer.advantages", _OUR_ADVANTAGES)

POLICY_LOSSES: Registry[PolicyLoss] = Registry(
    "policy loss",
    "bessemer.policy_losses",
    [
        Plugin("clip", "PPO's and GRPO's clipped ratio", f"{_LOSSES}:CLIP"),
        Plugin("gspo", "the clipped ratio of whole sequences, the geometric mean", f"{_LOSSES}:GSPO"),
        Plugin("cispo", "the clipped ratio as a weight of log π", f"{_LOSSES}:CISPO"),
        Plugin("sapo", "a smooth gate in the place of the clip", f"{_LOSSES}:SAPO"),
        Plugin("importance", "the ratio without a clip", f"{_LOSSES}:IMPORTANCE"),
        Plugin("reinforce", "log π times the advantage", f"{_LOSSES}:REINFORCE"),
    ],
)

AGGREGATIONS: Registry[Aggregation] = Registry(
    "aggregation",
    "bessemer.aggregations",
    [
        Plugin("token_mean", "every token alike (DAPO; Yu et al. 2025)", f"{_LOSSES}:TOKEN_MEAN"),
        Plugin("sequence_mean", "the mean of the answers' means (GRPO; Shao et al. 2024)", f"{_LOSSES}:SEQUENCE_MEAN"),
        Plugin("constant", "over answers times the longest length (Dr. GRPO; Liu et al. 2025)", f"{_LOSSES}:CONSTANT"),
        Plugin("prompt_mean", "the mean of the prompts' token means (ScaleRL; Khatri et al. 2025)", f"{_LOSSES}:PROMPT_MEAN"),
    ],
)

CORRECTIONS: Registry[Correction] = Registry(
    "off-policy correction",
    "bessemer.corrections",
    [
        Plugin("none", "no correction", f"{_LOSSES}:NONE"),
        Plugin("truncate", "each token's weight, at most 2 (truncated importance sampling)", f"{_LOSSES}:TRUNCATE"),
        Plugin("mask_sequence", "a sequence's weight, left out above 3 (TRL's default)", f"{_LOSSES}:MASK_SEQUENCE"),
        Plugin("icepop", "each token's weight, left out outside 0.5 and 5", f"{_LOSSES}:ICEPOP"),
        Plugin("reject", "answers whose geometric mean lies outside 0.999 and 1.001 are left out", f"{_LOSSES}:REJECT"),
    ],
)

DIVERGENCES: Registry[Divergence] = Registry(
    "estimator of the KL divergence",
    "bessemer.divergences",
    [
        Plugin("k1", "the log-ratio; for the reward", f"{_LOSSES}:k1"),
        Plugin("k2", "half its square", f"{_LOSSES}:k2"),
        Plugin("k3", "exp(−d) + d − 1; for the loss", f"{_LOSSES}:k3"),
        Plugin("abs", "its absolute value", f"{_LOSSES}:absolute"),
    ],
)
