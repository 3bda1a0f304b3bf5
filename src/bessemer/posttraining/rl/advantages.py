"""Advantages: how much better an answer was than expected, from the rewards of the answers to the same prompt, or from a
critic's values.

Answers lie group by group: R = P·G rewards are those of P prompts with G answers each. A reward that could not be given is
NaN; its answer is left out of every mean, and its advantage is zero.

Shapes: R answers, P prompts, G answers to a prompt, K rewards, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Added to a standard deviation before it divides, as TRL and DeepSeekMath do.
_EPSILON = 1e-4

#: Arguments: rewards of answers, (R,), and answers per prompt. Returns advantages, (R,).
OfAnswers = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class RewardToGo:
    """Advantages of tokens without a critic: the rewards of tokens still to come, whitened over all tokens of the rollout.

    outcomes: what of the answers' rewards is given at their last tokens; NaN where there is none.
    """

    outcomes: OfAnswers


#: Advantages of answers, which all of their tokens have; or of tokens.
Advantage = OfAnswers | RewardToGo


def grpo(rewards_R: Tensor, group: int) -> Tensor:
    """(r − mean) / (standard deviation + 1e-4) in the group, with Bessel's correction (Shao et al. 2024, section 4.1.2)."""
    centred_PG = _centred(rewards_R.view(-1, group))
    return _known(centred_PG / (_deviation(centred_PG) + _EPSILON))


def group_mean(rewards_R: Tensor, group: int) -> Tensor:
    """r − mean of the group (Dr. GRPO; Liu et al. 2025, eq. 3)."""
    return _known(_centred(rewards_R.view(-1, group)))


def batch_deviation(rewards_R: Tensor, group: int) -> Tensor:
    """(r − mean of the group) / standard deviation of the batch's rewards (Lite PPO, Liu et al. 2025; TRL's `batch`)."""
    centred_PG = _centred(rewards_R.view(-1, group))
    return _known(centred_PG / (_deviation(_centred(rewards_R.view(1, -1))) + _EPSILON))


def centred_deviation(rewards_R: Tensor, group: int) -> Tensor:
    """(r − mean of the group) / standard deviation of these differences over the batch (ScaleRL, Khatri et al. 2025)."""
    centred_PG = _centred(rewards_R.view(-1, group))
    return _known(centred_PG / (_deviation(centred_PG.view(1, -1)) + _EPSILON))


def leave_one_out(rewards_R: Tensor, group: int) -> Tensor:
    """r − mean of the group's other answers (RLOO; Kool et al. 2019, Ahmadian et al. 2024). Zero without another answer."""
    rewards_PG = rewards_R.view(-1, group)
    count_P1 = _count(rewards_PG)
    others_P1 = (count_P1 - 1).clamp(min=1)
    return _known(_centred(rewards_PG) * count_P1 / others_P1 * (count_P1 > 1))


def as_given(rewards_R: Tensor, group: int) -> Tensor:
    """The reward r itself."""
    return rewards_R


def centred(rewards_R: Tensor, group: int) -> Tensor:
    """r − mean of the group; NaN stays NaN."""
    return _centred(rewards_R.view(-1, group)).reshape(-1)


#: REINFORCE++ and its variant with the group's mean as a baseline (Hu et al. 2025, arXiv 2501.03262).
REINFORCE_PP, REINFORCE_PP_BASELINE = RewardToGo(as_given), RewardToGo(centred)


def decoupled(rewards_RK: Tensor, weights_K: Tensor, group: int, penalties_R: Tensor | float = 0.0) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward's z-score in its group, their weighted sum, and its z-score over the batch.

    penalties_R: subtracted from the sum, as a divergence in the reward.
    """
    scores_RK = torch.stack([grpo(rewards_R, group) for rewards_R in rewards_RK.unbind(1)], 1)
    missing_R = rewards_RK.isnan().all(1)
    total_R = ((scores_RK * weights_K).sum(1) - penalties_R).masked_fill(missing_R, torch.nan)
    return _whitened(total_R)


def is_informative(rewards_R: Tensor, group: int) -> Tensor:
    """Whether the known rewards of a prompt's answers differ, (P,): an equal group teaches nothing (DAPO; Yu et al. 2025)."""
    rewards_PG = rewards_R.view(-1, group)
    highest_P = rewards_PG.nan_to_num(nan=-torch.inf).amax(1)
    return highest_P > rewards_PG.nan_to_num(nan=torch.inf).amin(1)


@dataclass(frozen=True)
class Returns:
    """advantages_BT and the returns that a value head learns, returns_BT; zero outside the mask."""

    advantages_BT: Tensor
    returns_BT: Tensor


def generalised_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
    discount: float = 1.0,
    decay: float = 0.95,
) -> Returns:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t.

    mask_BT: True for the tokens that the policy chose. Others, such as a tool's answer between two of its own, are passed over:
    the next token of the policy's own follows the last. document_ids_BT: of packed rows, the sequence of each token; None: a
    row is one. Beyond a sequence's last token the value is zero: it has ended.
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B, next_advantage_B = torch.zeros_like(values_BT[:, 0]), torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        if document_ids_BT is not None and t + 1 < values_BT.shape[1]:
            goes_on_B = document_ids_BT[:, t] == document_ids_BT[:, t + 1]
            next_value_B, next_advantage_B = next_value_B * goes_on_B, next_advantage_B * goes_on_B
        error_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        advantage_B = error_B + discount * decay * next_advantage_B
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        advantages_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0.0)
    return Returns(advantages_BT, (advantages_BT + values_BT) * mask_BT)


def rewards_to_go(
    rewards_BT: Tensor, mask_BT: Tensor, *, document_ids_BT: Tensor | None = None, discount: float = 1.0
) -> Tensor:
    """Σ γ^l r_{t+l} over the tokens of the mask, from each to its sequence's last; zero outside the mask.

    Generalised advantages with λ = 1 of a critic whose values are 0. Arguments as in `generalised_advantages`.
    """
    values_BT = torch.zeros_like(rewards_BT)
    return generalised_advantages(
        rewards_BT, values_BT, mask_BT, document_ids_BT=document_ids_BT, discount=discount, decay=1.0
    ).advantages_BT


def whitened_tokens(values: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Values of the tokens of several batches, (B, T) each, whitened over the tokens of all masks; zero outside these."""
    chosen = [values_BT[mask_BT] for values_BT, mask_BT in zip(values, masks, strict=True)]
    white = whitened(torch.cat(chosen)).split([len(chosen_N) for chosen_N in chosen])
    return [
        white_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, white_N) for white_N, mask_BT in zip(white, masks, strict=True)
    ]


def whitened(values_N: Tensor) -> Tensor:
    """(value − mean) / √(variance + 1e-8), with Bessel's correction; zeros of fewer than two values."""
    if len(values_N) < 2:
        return torch.zeros_like(values_N)
    return (values_N - values_N.mean()) * torch.rsqrt(values_N.var() + 1e-8)


def _count(rewards_PG: Tensor) -> Tensor:
    return (~rewards_PG.isnan()).sum(1, keepdim=True).to(rewards_PG.dtype)


def _centred(rewards_PG: Tensor) -> Tensor:
    """Each reward minus the mean of the known ones in its row; NaN stays NaN."""
    return rewards_PG - rewards_PG.nanmean(1, keepdim=True)


def _deviation(centred_PG: Tensor) -> Tensor:
    """The standard deviation of the known values of each row with Bessel's correction, (P, 1); 0 of fewer than two."""
    squares_P1 = centred_PG.square().nansum(1, keepdim=True)
    return (squares_P1 / (_count(centred_PG) - 1).clamp(min=1)).sqrt()


def _whitened(values_R: Tensor) -> Tensor:
    centred_1R = _centred(values_R[None])
    return _known(centred_1R * torch.rsqrt(_deviation(centred_1R).square() + 1e-8))


def _known(advantages: Tensor) -> Tensor:
    """Rewards (R,), with zero for unknown ones."""
    return advantages.reshape(-1).nan_to_num(nan=0.0)
