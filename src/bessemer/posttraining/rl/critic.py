"""Proximal policy optimisation's critic: advantages of tokens, from the values that it expects, and its own objective.

V(s_t) is the reward still to come after token t of the row has been read: it is read where the policy chooses token t + 1.

Shapes: B rows, T tokens of a row, R samples of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.model.decoder import Decoder
from bessemer.posttraining.rl.advantages import generalised_advantages, whitened_tokens
from bessemer.posttraining.rl.critic_config import CriticConfig
from bessemer.posttraining.rl.objective import ADVANTAGES
from bessemer.posttraining.rl.policy_losses import value_loss
from bessemer.posttraining.rl.samples import Packed
from bessemer.posttraining.rl.sharing import of_all_rows
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms
from bessemer.training.trainee import Trainee

#: The role of the critic, and values of tokens in a batch: what the critic said of them when the rollout was made, and what it
#: is to learn.
CRITIC, OLD_VALUES, RETURNS = "critic", "old_values", "returns"


def token_values(model: Decoder, batch: Batch) -> Tensor:
    """V of each token that has a target, (B, T); zero elsewhere."""
    hidden_BTD = model.hidden(**batch.inputs)
    # not by a product: what stands at padding may be anything
    return model.scores(hidden_BTD)[..., 0].where(_chosen(batch), 0)


@dataclass(frozen=True)
class Valued:
    """Mini-batches with advantages, values and returns of their tokens. advantages_R: means of samples, for a reader."""

    packed: Sequence[Packed]
    advantages_R: Tensor
    figures: Mapping[str, float]


@dataclass(frozen=True)
class _Estimates:
    """Of the tokens of a mini-batch that the policy chose, those of the mask; zero elsewhere."""

    mask_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


def with_values(
    packed: Sequence[Packed], rewards_R: Tensor, penalties: Sequence[Tensor], trainee: Trainee, config: CriticConfig
) -> Valued:
    """Mini-batches with generalised advantages, whitened over the tokens of the rollout.

    rewards_R: of the samples of all mini-batches, given at their last tokens; NaN where there is none. penalties: of each
    mini-batch, what is taken off the rewards of single tokens, (B, T). Figures: `value`, the mean of the critic's values;
    `explained_variance`, 1 − Var(R − V) / Var(R): 1 of a critic that knows, 0 of one that says the same of all.
    """
    parts = rewards_R.split([one.samples for one in packed])
    found = [
        _estimates(one, part_R, penalty_BT, trainee, config)
        for one, part_R, penalty_BT in zip(packed, parts, penalties, strict=True)
    ]
    white = whitened_tokens([each.advantages_BT for each in found], [each.mask_BT for each in found])
    valued = [
        one.with_values({ADVANTAGES: white_BT, OLD_VALUES: each.values_BT, RETURNS: each.returns_BT})
        for one, each, white_BT in zip(packed, found, white, strict=True)
    ]
    means_R = torch.cat([one.means(white_BT) for one, white_BT in zip(packed, white, strict=True)])
    values_N = torch.cat([each.values_BT[each.mask_BT] for each in found])
    returns_N = torch.cat([each.returns_BT[each.mask_BT] for each in found])
    return Valued(valued, means_R, _figures(values_N, returns_N))


def _estimates(one: Packed, rewards_R: Tensor, penalty_BT: Tensor, trainee: Trainee, config: CriticConfig) -> _Estimates:
    batch, mask_BT = one.batch, _chosen(one.batch)
    values_BT = of_all_rows(trainee, batch, lambda rows: trainee.per_token(CRITIC, rows, token_values))
    rewards_BT = one.at_ends(rewards_R.nan_to_num(nan=0.0).to(values_BT)) - penalty_BT
    found = generalised_advantages(
        rewards_BT,
        values_BT,
        mask_BT,
        document_ids_BT=batch.document_ids_BT,
        discount=config.discount,
        decay=config.decay,
    )
    return _Estimates(mask_BT, values_BT.where(mask_BT, 0), found.advantages_BT, found.returns_BT)


def _figures(values_N: Tensor, returns_N: Tensor) -> dict[str, float]:
    spread = float(returns_N.var(correction=0))
    explained = {"explained_variance": 1 - float((returns_N - values_N).var(correction=0)) / spread} if spread > 0 else {}
    return {"value": float(values_N.mean()), **explained}


def _chosen(batch: Batch) -> Tensor:
    return batch.targets_BT != IGNORE_INDEX


class ActorCriticObjective(Objective):
    """The policy's objective for the policy, and for the critic the clipped squared error of its values, by token.

    Logged besides: `value_error`, the mean squared error of a value.
    """

    guards_loss = False

    def __init__(self, policy: Objective, critic: CriticConfig) -> None:
        self._policy = policy
        self._critic = critic

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """Those of the policy, and the number of tokens for `value`."""
        return {**self._policy.denominators(batch), "value": Count(batch.targets)}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's tokens, for the role's own terms."""
        if context.role != CRITIC:
            return self._policy(model, batch, context)
        values_BT = token_values(model, batch)
        old_BT, returns_BT = (batch.per_token[name].to(values_BT.dtype) for name in (OLD_VALUES, RETURNS))
        mask_BT = _chosen(batch).to(values_BT.dtype)
        losses_BT = value_loss(values_BT, old_BT, returns_BT, self._critic.clip)
        with torch.no_grad():
            error = ((values_BT - returns_BT).square() * mask_BT).sum()
        return Terms(
            {"value": self._critic.weight * (losses_BT * mask_BT).sum()}, {"value_error": Metric(error, mask_BT.sum())}
        )
