"""The objective of preference optimisation: a loss of pairs, of a policy beside a reference.

Shapes: B rows, T tokens of a row, S sequences of a row, P = S / 2 pairs of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bessemer.model.decoder import Decoder
from bessemer.posttraining.preference.losses import PairLoss, PairLossSettings
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.head import token_log_probs
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms
from bessemer.training.trainee import REFERENCE, Trainee

#: The reference's log-probabilities, by token.
REFERENCE_LOG_PROBS = "reference_log_probs"
#: Targets with the prompts of the chosen answers among them, by token.
_CONVERSATION = "conversation_targets"


class PreferenceObjective(Objective):
    """Mean of a loss over pairs, and perhaps the cross-entropy of the chosen answers beside it.

    Logged: `accuracy`, the share of pairs whose chosen answer has the higher implicit reward; `margin`, the mean difference of
    implicit rewards; `reward_chosen`, `reward_rejected`, β times the log-ratios; and the log-probabilities a token of both.
    """

    def __init__(self, loss: PairLoss, settings: PairLossSettings, next_token: float = 0.0) -> None:
        """next_token: weight of the mean cross-entropy of the chosen answers, added to that of a method that has one, which is
        of their whole conversations."""
        self._loss = loss
        self._settings = settings
        self._next_token = next_token + loss.next_token

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The sum of the weights of pairs; of the cross-entropy, the number of its tokens."""
        found = {"preference": Count(float(batch.per_sequence["pair_weight"].sum()) / 2, "sequence")}
        if self._next_token:
            found["next_token"] = Count(float(_chosen_tokens(batch).sum()))
        return found

    def annotate(self, trainee: Trainee, batch: Batch) -> Batch:
        """With the reference's log-probabilities, unless the batch brings them, and the targets of whole conversations for a
        method that learns those."""
        if self._loss.next_token:
            batch = batch.with_values(per_token={_CONVERSATION: _conversation_targets(batch)})
        if not self._loss.needs_reference or REFERENCE_LOG_PROBS in batch.per_token:
            return batch
        return batch.with_values(per_token={REFERENCE_LOG_PROBS: trainee.log_probs(batch, REFERENCE)})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's pairs."""
        every_BT = target_log_probs(model, batch, batch.per_token.get(_CONVERSATION, batch.targets_BT))
        log_probs_BT = every_BT * _is_target(batch.targets_BT)
        ratios_BT = log_probs_BT
        if self._loss.needs_reference:
            ratios_BT = log_probs_BT - batch.per_token[REFERENCE_LOG_PROBS].to(log_probs_BT.dtype)
        sums_BS, policy_BS, tokens_BS = context.sum_over_context(
            torch.stack(
                [
                    batch.sequence_sums(values)
                    for values in (ratios_BT, log_probs_BT, _is_target(batch.targets_BT).to(ratios_BT))
                ]
            )
        ).unbind(0)
        tokens_BS = tokens_BS.detach().clamp(min=1)
        ratios_BS = sums_BS / tokens_BS if self._loss.per_token else sums_BS
        chosen_BP, rejected_BP = ratios_BS[:, 0::2], ratios_BS[:, 1::2]
        weight_BP = batch.per_sequence["pair_weight"][:, 0::2].to(ratios_BS.dtype)
        settings = self._of_pairs(batch, ratios_BS.dtype)
        losses_BP = self._loss.function(chosen_BP.flatten(), rejected_BP.flatten(), settings).view_as(chosen_BP)
        sums = {"preference": context.once((losses_BP * weight_BP).sum())}
        if self._next_token:
            sums["next_token"] = -self._next_token * (every_BT * _chosen_tokens(batch)).sum()
        with torch.no_grad():
            rewards_BP = [self._settings.beta * side_BP for side_BP in (chosen_BP, rejected_BP)]
            mean_BS = policy_BS / tokens_BS
            figures_BP = {
                "accuracy": (rewards_BP[0] > rewards_BP[1]).to(ratios_BS.dtype),
                "margin": rewards_BP[0] - rewards_BP[1],
                "reward_chosen": rewards_BP[0],
                "reward_rejected": rewards_BP[1],
                "log_prob_chosen": mean_BS[:, 0::2],
                "log_prob_rejected": mean_BS[:, 1::2],
            }
            pairs = context.once(weight_BP.sum())
            metrics = {name: Metric(context.once((one * weight_BP).sum()), pairs) for name, one in figures_BP.items()}
        return Terms(sums, metrics)

    def _of_pairs(self, batch: Batch, dtype: torch.dtype) -> PairLossSettings:
        """The loss's settings, smoothed for each pair where the labels have a confidence c: a label is right where it was given
        rightly and not swapped, or the other way round, with the probability c(1 − ε) + (1 − c)ε."""
        if "confidence" not in batch.per_sequence:
            return self._settings
        assert self._loss.soft_labels, "asked before"
        confidence_P = batch.per_sequence["confidence"][:, 0::2].to(dtype).flatten()
        swapped = self._settings.label_smoothing
        right_P = confidence_P * (1 - swapped) + (1 - confidence_P) * swapped
        return replace(self._settings, label_smoothing=1 - right_P)


def target_log_probs(model: Decoder, batch: Batch, targets_BT: Tensor | None = None) -> Tensor:
    """log p of each target, of the batch's own where no others are given, (B, T); 0 where there is none."""
    targets_BT = batch.targets_BT if targets_BT is None else targets_BT
    hidden_BTD = model.hidden(**batch.inputs)
    log_probs_N, _ = token_log_probs(
        hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), softcap=model.logit_softcap
    )
    return log_probs_N.view_as(targets_BT)


def _is_target(targets_BT: Tensor) -> Tensor:
    return targets_BT != IGNORE_INDEX


def _chosen_tokens(batch: Batch) -> Tensor:
    """Whether a token has a target that the cross-entropy of chosen answers, or their conversations, is of: (B, T)."""
    is_chosen_BT = batch.sequence_of_token_BT % 2 == 0
    return is_chosen_BT & _is_target(batch.per_token.get(_CONVERSATION, batch.targets_BT))


def _conversation_targets(batch: Batch) -> Tensor:
    """The batch's targets, and those of the prompts of chosen answers: the next token of the same sequence. Of whole rows."""
    documents_BT = batch.document_ids_BT
    assert documents_BT is not None, "pairs are packed"
    next_BT = torch.full_like(batch.tokens_BT, IGNORE_INDEX)
    goes_on_BT = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, :-1] % 2 == 1)
    next_BT[:, :-1] = batch.tokens_BT[:, 1:].masked_fill(~goes_on_BT, IGNORE_INDEX)
    # of rows that fill up the last batch nothing is a target
    is_row_B1 = _is_target(batch.targets_BT).any(1, keepdim=True)
    return torch.where(_is_target(batch.targets_BT) | ~is_row_B1, batch.targets_BT, next_BT)
