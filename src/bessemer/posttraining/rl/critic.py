"""The critic of PPO: values of tokens, the advantages that follow from them, and its objective beside the policy's.

It says V(s_t), the reward still to come after token t of the row has been read: it is read where the policy chooses token
t + 1.

Shapes: R answers, B rows, T tokens, N tokens of the policy in all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.model.decoder import Decoder
from bessemer.posttraining.rl.advantages import generalised_advantages, whitened_tokens
from bessemer.posttraining.rl.config import CriticConfig
from bessemer.posttraining.rl.losses import value_loss
from bessemer.posttraining.sampling.samples import ADVANTAGES, Packed, of_all_rows
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.model_roles import ModelRoles
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms

#: The role of the critic, and keys of values of tokens in a batch: the critic's values when the rollout was made, and its
#: targets.
CRITIC, OLD_VALUES, RETURNS = "critic", "old_values", "returns"


def token_values(model: Decoder, batch: Batch) -> Tensor:
    """V of each token that has a target, (B, T); zero elsewhere."""
    hidden_BTD = model.hidden(**batch.inputs)
    # not by multiplying: scores at padding may not be finite
    return model.scores(hidden_BTD)[..., 0].where(_chosen(batch), 0)


@dataclass(frozen=True)
class Valued:
    """Mini-batches with advantages, values and returns of their tokens. advantages_R: means of samples, for a reader."""

    packed: Sequence[Packed]
    advantages_R: Tensor
    figures: Mapping[str, float]


@dataclass(frozen=True)
class _Estimates:
    """Estimates for the policy's tokens of a mini-batch, which the mask marks; zero elsewhere."""

    mask_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


def with_values(
    packed: Sequence[Packed], rewards_R: Tensor, penalties: Sequence[Tensor], models: ModelRoles, config: CriticConfig
) -> Valued:
    """Mini-batches with generalised advantages, whitened over the tokens of the rollout.

    rewards_R: of the samples of all mini-batches, given at their last tokens; NaN where there is none. penalties: of each
    mini-batch, what is taken off the rewards of single tokens, (B, T). Figures: `value`, the mean of the critic's values;
    `explained_variance`, 1 − Var(R − V) / Var(R): 1 of a critic that knows, 0 of one that says the same of all.
    """
    parts = rewards_R.split([one.samples for one in packed])
    estimates = [
        _estimates(one, part_R, penalty_BT, models, config)
        for one, part_R, penalty_BT in zip(packed, parts, penalties, strict=True)
    ]
    white = whitened_tokens([each.advantages_BT for each in estimates], [each.mask_BT for each in estimates])
    valued = [
        one.with_values({ADVANTAGES: white_BT, OLD_VALUES: each.values_BT, RETURNS: each.returns_BT})
        for one, each, white_BT in zip(packed, estimates, white, strict=True)
    ]
    means_R = torch.cat([one.means(white_BT) for one, white_BT in zip(packed, white, strict=True)])
    values_N = torch.cat([each.values_BT[each.mask_BT] for each in estimates])
    returns_N = torch.cat([each.returns_BT[each.mask_BT] for each in estimates])
    return Valued(valued, means_R, _figures(values_N, returns_N))


def _estimates(one: Packed, rewards_R: Tensor, penalty_BT: Tensor, models: ModelRoles, config: CriticConfig) -> _Estimates:
    batch, mask_BT = one.batch, _chosen(one.batch)
    values_BT = of_all_rows(models, batch, lambda rows: models.per_token(CRITIC, rows, token_values))
    rewards_BT = one.at_ends(rewards_R.nan_to_num(nan=0.0).to(values_BT)) - penalty_BT
    estimates = generalised_advantages(
        rewards_BT,
        values_BT,
        mask_BT,
        document_ids_BT=batch.document_ids_BT,
        discount=config.discount,
        decay=config.decay,
    )
    return _Estimates(mask_BT, values_BT.where(mask_BT, 0), estimates.advantages_BT, estimates.returns_BT)


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
