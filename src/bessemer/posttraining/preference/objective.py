"""Objectives of preference optimisation, of a policy beside a reference: a loss of pairs, KTO's loss of answers that are good
or bad by themselves (Ethayarajh et al. 2024), and NPO's of answers to forget beside others to keep (Zhang et al. 2024).

Shapes: B rows, T tokens of a row, S sequences of a row, P = S / 2 pairs of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bessemer.model.decoder import Decoder
from bessemer.posttraining.data.packing import mismatched
from bessemer.posttraining.preference.losses import PairLoss, PairLossSettings, kto, npo
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import target_log_probs
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms

#: Key of the reference's log-probabilities of tokens.
REFERENCE_LOG_PROBS = "reference_log_probs"
#: Key of targets that include the prompts of chosen answers.
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
        counts = {"preference": Count(float(batch.per_sequence["pair_weight"].sum()) / 2, "sequence")}
        if self._next_token:
            counts["next_token"] = Count(float(_chosen_tokens(batch).sum()))
        return counts

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """Add the reference's log-probabilities unless the batch has them, and the targets of whole conversations for a
        method that learns those."""
        if self._loss.next_token:
            batch = batch.with_values(per_token={_CONVERSATION: _conversation_targets(batch)})
        if not self._loss.needs_reference or REFERENCE_LOG_PROBS in batch.per_token:
            return batch
        return batch.with_values(per_token={REFERENCE_LOG_PROBS: models.log_probs(batch, REFERENCE)})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        targets_BT = batch.per_token.get(_CONVERSATION, batch.targets_BT)
        every_BT, _ = target_log_probs(model, model.hidden(**batch.inputs), targets_BT)
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


def _is_target(targets_BT: Tensor) -> Tensor:
    return targets_BT != IGNORE_INDEX


def _chosen_tokens(batch: Batch) -> Tensor:
    """Whether a token's target counts in the cross-entropy of chosen answers, or of their conversations: (B, T)."""
    is_chosen_BT = batch.sequence_of_token_BT % 2 == 0
    return is_chosen_BT & _is_target(batch.per_token.get(_CONVERSATION, batch.targets_BT))


def _conversation_targets(batch: Batch) -> Tensor:
    """The batch's targets, and those of the prompts of chosen answers: the next token of the same sequence. Of whole rows."""
    documents_BT = batch.document_ids_BT
    assert documents_BT is not None, "pairs are packed"
    next_BT = torch.full_like(batch.tokens_BT, IGNORE_INDEX)
    goes_on_BT = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, :-1] % 2 == 1)
    next_BT[:, :-1] = batch.tokens_BT[:, 1:].masked_fill(~goes_on_BT, IGNORE_INDEX)
    # rows that only fill up the last batch have no targets
    is_row_B1 = _is_target(batch.targets_BT).any(1, keepdim=True)
    return torch.where(_is_target(batch.targets_BT) | ~is_row_B1, batch.targets_BT, next_BT)


#: Key of the reference's log-probabilities of the mismatched examples' tokens.
MISMATCHED_REFERENCE = "reference_of_mismatched"


class KTOObjective(Objective):
    """Mean over answers of KTO's loss, the good and the bad ones weighted.

    z, the divergence that answers are measured against, is the positive part of the mean log-ratio of mismatched examples over
    the whole batch, all micro-batches and ranks; it is computed before the step, and no gradient flows through it.

    Logged: `kl`, z; `accuracy`, the share of answers that lie on their side of z; `reward_desirable` and `reward_undesirable`,
    the mean of β times the log-ratios.
    """

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        self._beta = beta
        self._weights = (desirable_weight, undesirable_weight)

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return {"preference": Count(float(batch.per_sequence["is_answer"].sum()), "sequence")}

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """Add z, and the reference's log-probabilities unless the batch has them."""
        twins, added = mismatched(batch), {}
        if REFERENCE_LOG_PROBS not in batch.per_token:
            added[REFERENCE_LOG_PROBS] = models.log_probs(batch, REFERENCE)
        of_twins_BT = batch.per_token.get(MISMATCHED_REFERENCE)
        if of_twins_BT is None:
            of_twins_BT = models.log_probs(twins, REFERENCE)
        ratios_BS = twins.sequence_sums(models.log_probs(twins, POLICY) - of_twins_BT)
        is_answer_BS = twins.per_sequence["is_answer"]
        sums = torch.stack([(ratios_BS * is_answer_BS).sum(), is_answer_BS.sum().to(ratios_BS.dtype)])
        layout = models.mesh.layout
        # ranks of the other axes have the same rows
        total, count = models.mesh.sum(sums, layout.tensor * layout.pipeline * layout.context).unbind()
        kl_BS = (total / count.clamp(min=1)).clamp(min=0).to(ratios_BS.dtype).expand(ratios_BS.shape)
        return batch.with_values(per_token=added, per_sequence={"kl": kl_BS})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        log_probs_BT, _ = target_log_probs(model, model.hidden(**batch.inputs), batch.targets_BT)
        ratios_BT = log_probs_BT - batch.per_token[REFERENCE_LOG_PROBS].to(log_probs_BT.dtype)
        ratios_BS = context.sum_over_context(batch.sequence_sums(ratios_BT))
        of_sequences = (batch.per_sequence[name].to(ratios_BS.dtype) for name in ("is_answer", "is_desirable", "kl"))
        is_answer_BS, is_desirable_BS, kl_BS = of_sequences
        desirable, undesirable = self._weights
        weights_BS = is_desirable_BS * desirable + (is_answer_BS - is_desirable_BS) * undesirable
        losses_BS = kto(ratios_BS, is_desirable_BS > 0, kl_BS, self._beta) * weights_BS
        with torch.no_grad():
            is_undesirable_BS = is_answer_BS - is_desirable_BS
            # right where the reward is on the answer's own side of z; exactly z counts as wrong
            is_right_BS = torch.where(is_desirable_BS > 0, ratios_BS > kl_BS, ratios_BS < kl_BS).to(ratios_BS.dtype)
            figures = {
                "kl": (kl_BS, is_answer_BS),
                "accuracy": (is_right_BS, is_answer_BS),
                "reward_desirable": (self._beta * ratios_BS, is_desirable_BS),
                "reward_undesirable": (self._beta * ratios_BS, is_undesirable_BS),
            }
            metrics = {
                name: Metric(context.once((values_BS * of_BS).sum()), context.once(of_BS.sum()))
                for name, (values_BS, of_BS) in figures.items()
            }
        return Terms({"preference": context.once(losses_BS.sum())}, metrics)


class UnlearningObjective(Objective):
    """NPO: the mean of `losses.npo` over the answers to forget, and the mean cross-entropy of the answers to keep (Zhang et al.
    2024, section 4.2, "NPO+RT").

    A batch without answers of one kind has the other's term alone. Logged: `log_ratio_forget`, the mean log-ratio to the
    reference of an answer to forget, in nats; `log_prob_forget` and `log_prob_retain`, mean log-probabilities a token.
    """

    def __init__(self, beta: float = 0.1, retain_weight: float = 1.0) -> None:
        self._beta = beta
        self._retain_weight = retain_weight

    def denominators(self, batch: Batch) -> dict[str, Count]:
        forget_BS, kept_BT = _forgotten(batch), _kept_tokens(batch)
        return {"forget": Count(float(forget_BS.sum()), "sequence"), "retain": Count(float(kept_BT.sum()))}

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """Add the reference's log-probabilities unless the batch has them."""
        if REFERENCE_LOG_PROBS in batch.per_token:
            return batch
        return batch.with_values(per_token={REFERENCE_LOG_PROBS: models.log_probs(batch, REFERENCE)})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        log_probs_BT, _ = target_log_probs(model, model.hidden(**batch.inputs), batch.targets_BT)
        log_probs_BT = log_probs_BT * _is_target(batch.targets_BT)
        ratios_BT = log_probs_BT - batch.per_token[REFERENCE_LOG_PROBS].to(log_probs_BT.dtype)
        sums_BS, policy_BS, tokens_BS = context.sum_over_context(
            torch.stack(
                [
                    batch.sequence_sums(values)
                    for values in (ratios_BT, log_probs_BT, _is_target(batch.targets_BT).to(log_probs_BT))
                ]
            )
        ).unbind(0)
        forget_BS, kept_BT = _forgotten(batch).to(sums_BS.dtype), _kept_tokens(batch)
        forgotten = context.once((npo(sums_BS, self._beta) * forget_BS).sum())
        retained = -(log_probs_BT * kept_BT).sum()
        with torch.no_grad():
            of_sequences = {
                "log_ratio_forget": (sums_BS, forget_BS),
                "log_prob_forget": (policy_BS / tokens_BS.clamp(min=1), forget_BS),
            }
            metrics = {
                name: Metric(context.once((values_BS * of_BS).sum()), context.once(of_BS.sum()))
                for name, (values_BS, of_BS) in of_sequences.items()
            }
            metrics["log_prob_retain"] = Metric(-retained, kept_BT.sum())
        return Terms({"forget": forgotten, "retain": self._retain_weight * retained}, metrics)


def _forgotten(batch: Batch) -> Tensor:
    """1 for sequences to forget, (B, S)."""
    return batch.per_sequence["is_answer"] - batch.per_sequence["is_desirable"]


def _kept_tokens(batch: Batch) -> Tensor:
    """Whether a token's target is of an answer to keep, (B, T)."""
    return (batch.of_tokens(batch.per_sequence["is_desirable"]) > 0) & _is_target(batch.targets_BT)
