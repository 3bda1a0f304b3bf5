"""The objective of KTO: answers that are good or bad by themselves, of a policy beside a reference.

Shapes: B rows, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

import torch

from bessemer.model.decoder import Decoder
from bessemer.posttraining.preference.labelled import mismatched
from bessemer.posttraining.preference.losses import kto
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, target_log_probs
from bessemer.training.data.batches import Batch
from bessemer.training.objectives import POLICY, Count, LossContext, Metric, Objective, Terms
from bessemer.training.trainee import REFERENCE, Trainee

#: The reference's log-probabilities of the mismatched examples, by token.
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
        """The number of answers."""
        return {"preference": Count(float(batch.per_sequence["is_answer"].sum()), "sequence")}

    def annotate(self, trainee: Trainee, batch: Batch) -> Batch:
        """With z, and with the reference's log-probabilities, unless the batch brings them."""
        twins, added = mismatched(batch), {}
        if REFERENCE_LOG_PROBS not in batch.per_token:
            added[REFERENCE_LOG_PROBS] = trainee.log_probs(batch, REFERENCE)
        of_twins_BT = batch.per_token.get(MISMATCHED_REFERENCE)
        if of_twins_BT is None:
            of_twins_BT = trainee.log_probs(twins, REFERENCE)
        ratios_BS = twins.sequence_sums(trainee.log_probs(twins, POLICY) - of_twins_BT)
        is_answer_BS = twins.per_sequence["is_answer"]
        sums = torch.stack([(ratios_BS * is_answer_BS).sum(), is_answer_BS.sum().to(ratios_BS.dtype)])
        layout = trainee.mesh.layout
        # every rank of the other axes has the same rows
        total, count = trainee.mesh.sum(sums, layout.tensor * layout.pipeline * layout.context).unbind()
        kl_BS = (total / count.clamp(min=1)).clamp(min=0).to(ratios_BS.dtype).expand(ratios_BS.shape)
        return batch.with_values(per_token=added, per_sequence={"kl": kl_BS})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's answers."""
        log_probs_BT = target_log_probs(model, batch)
        ratios_BT = log_probs_BT - batch.per_token[REFERENCE_LOG_PROBS].to(log_probs_BT.dtype)
        ratios_BS = context.sum_over_context(batch.sequence_sums(ratios_BT))
        of_sequences = (batch.per_sequence[name].to(ratios_BS.dtype) for name in ("is_answer", "is_desirable", "kl"))
        is_answer_BS, is_desirable_BS, kl_BS = of_sequences
        desirable, undesirable = self._weights
        weights_BS = is_desirable_BS * desirable + (is_answer_BS - is_desirable_BS) * undesirable
        losses_BS = kto(ratios_BS, is_desirable_BS > 0, kl_BS, self._beta) * weights_BS
        with torch.no_grad():
            is_undesirable_BS = is_answer_BS - is_desirable_BS
            # on its own side of z; an answer at z itself is on none
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
