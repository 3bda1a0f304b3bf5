"""What a method of reinforcement learning is put together from, by name. Imports no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.posttraining.rl.advantages import Advantage
    from bessemer.posttraining.rl.aggregation import Aggregation
    from bessemer.posttraining.rl.corrections import Correction
    from bessemer.posttraining.rl.divergence import Divergence
    from bessemer.posttraining.rl.policy_losses import PolicyLoss

_RL = "bessemer.posttraining.rl"
_ADVANTAGES, _LOSSES = f"{_RL}.advantages", f"{_RL}.policy_losses"
_AGGREGATION, _CORRECTIONS, _DIVERGENCE = f"{_RL}.aggregation", f"{_RL}.corrections", f"{_RL}.divergence"

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
#: Those that no other package adds, whose settings are known.
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
        Plugin("token_mean", "every token alike (DAPO; Yu et al. 2025)", f"{_AGGREGATION}:TOKEN_MEAN"),
        Plugin("sequence_mean", "the mean of the answers' means (GRPO; Shao et al. 2024)", f"{_AGGREGATION}:SEQUENCE_MEAN"),
        Plugin("constant", "over answers times the longest length (Dr. GRPO; Liu et al. 2025)", f"{_AGGREGATION}:CONSTANT"),
        Plugin(
            "prompt_mean", "the mean of the prompts' token means (ScaleRL; Khatri et al. 2025)", f"{_AGGREGATION}:PROMPT_MEAN"
        ),
    ],
)

CORRECTIONS: Registry[Correction] = Registry(
    "off-policy correction",
    "bessemer.corrections",
    [
        Plugin("none", "no correction", f"{_CORRECTIONS}:NONE"),
        Plugin("truncate", "each token's weight, at most 2 (truncated importance sampling)", f"{_CORRECTIONS}:TRUNCATE"),
        Plugin("mask_sequence", "a sequence's weight, left out above 3 (TRL's default)", f"{_CORRECTIONS}:MASK_SEQUENCE"),
        Plugin("icepop", "each token's weight, left out outside 0.5 and 5", f"{_CORRECTIONS}:ICEPOP"),
        Plugin("reject", "answers whose geometric mean lies outside 0.999 and 1.001 are left out", f"{_CORRECTIONS}:REJECT"),
    ],
)

DIVERGENCES: Registry[Divergence] = Registry(
    "estimator of the KL divergence",
    "bessemer.divergences",
    [
        Plugin("k1", "the log-ratio; for the reward", f"{_DIVERGENCE}:k1"),
        Plugin("k2", "half its square", f"{_DIVERGENCE}:k2"),
        Plugin("k3", "exp(−d) + d − 1; for the loss", f"{_DIVERGENCE}:k3"),
        Plugin("abs", "its absolute value", f"{_DIVERGENCE}:absolute"),
    ],
)
