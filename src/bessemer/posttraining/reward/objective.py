"""The objective of reward modelling: the chosen answer of a pair gets the higher reward.

Shapes: B rows, T tokens of a row, S sequences of a row, P = S / 2 pairs of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bessemer.model.decoder import Decoder
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms


def ranking_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, confidence_P: Tensor | None = None) -> Tensor:
    """−log σ(r_w − r_l − m): the negative log-likelihood of Bradley and Terry's model (1952), with the margins of Touvron et
    al. (2023, Llama 2, eq. 2).

    With confidence c the cross-entropy with a label that is only probable:
    −c log σ(r_w − r_l − m) − (1 − c) log σ(r_l − r_w − m).
    """
    loss_P = -logsigmoid(chosen_P - rejected_P - margin_P)
    if confidence_P is None:
        return loss_P
    return confidence_P * loss_P - (1 - confidence_P) * logsigmoid(rejected_P - chosen_P - margin_P)


def centering_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(r_w + r_l)², which fixes where rewards lie (Eisenstein et al. 2023): the ranking sees their difference alone."""
    return (chosen_P + rejected_P).square()


def rewards(model: Decoder, batch: Batch) -> Tensor:
    """The score at the end token of each sequence, (B, S), 0 where its end is on another rank. The end token is the sequence's
    only target."""
    hidden_BTD = model.hidden(**batch.inputs)
    scores_BT = model.scores(hidden_BTD)[..., 0]
    # not by a product: what stands at padding may be anything
    return batch.sequence_sums(scores_BT.where(batch.targets_BT != IGNORE_INDEX, 0))


class RewardObjective(Objective):
    """Mean of the ranking loss over pairs, and of the centring loss with its weight.

    Logged: `accuracy`, the share of pairs whose chosen answer has the higher reward; `margin`, the mean difference of rewards;
    `reward_chosen`, `reward_rejected`, their means.
    """

    def __init__(self, centering: float = 0.0) -> None:
        self._centering = centering

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The sum of the weights of pairs, for every term."""
        pairs = Count(float(batch.per_sequence["pair_weight"].sum()) / 2, "sequence")
        return {"ranking": pairs, **({"centering": pairs} if self._centering else {})}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's pairs."""
        rewards_BS = context.sum_over_context(rewards(model, batch))
        chosen_BP, rejected_BP = rewards_BS[:, 0::2], rewards_BS[:, 1::2]
        weight_BP, margin_BP = (batch.per_sequence[name][:, 0::2].to(rewards_BS.dtype) for name in ("pair_weight", "margin"))
        confidence_BS = batch.per_sequence.get("confidence")
        confidence_BP = None if confidence_BS is None else confidence_BS[:, 0::2].to(rewards_BS.dtype)
        losses_BP = ranking_loss(chosen_BP, rejected_BP, margin_BP, confidence_BP)
        sums = {"ranking": context.once((losses_BP * weight_BP).sum())}
        if self._centering:
            centered_BP = self._centering * centering_loss(chosen_BP, rejected_BP)
            sums["centering"] = context.once((centered_BP * weight_BP).sum())
        with torch.no_grad():
            figures_BP = {
                "accuracy": (chosen_BP > rejected_BP).to(rewards_BS.dtype),
                "margin": chosen_BP - rejected_BP,
                "reward_chosen": chosen_BP,
                "reward_rejected": rejected_BP,
            }
            pairs = context.once(weight_BP.sum())
            metrics = {name: Metric(context.once((one * weight_BP).sum()), pairs) for name, one in figures_BP.items()}
        return Terms(sums, metrics)
