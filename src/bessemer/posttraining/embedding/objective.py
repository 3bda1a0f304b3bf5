"""InfoNCE over the passages of a row (van den Oord et al. 2018; Karpukhin et al. 2020, "Dense passage retrieval").

A row holds questions, the passage that answers each, and further passages. Each question's passage is to be nearer than every
other passage of its row: those that answer the row's other questions, and hard negatives. A passage with the same text as the
right one is no negative. Since rows are compared with themselves alone, the loss does not depend on how a batch is cut into
micro-batches.

Shapes: B rows, T tokens of a row, S texts of a row, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bessemer.model.decoder import Decoder
from bessemer.training.data.batch import Batch
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms

#: Values of `role` in `Batch.per_sequence`; 0: no text.
QUERY, POSITIVE, NEGATIVE = 1, 2, 3


def pooled(model: Decoder, batch: Batch, context: LossContext) -> Tensor:
    """The vector of each text of a row, (B, S, D) float32 of length 1: the mean of its tokens' hidden states after the last
    norm, as `Engine.embed` gives it. 0 where there is no text."""
    hidden_BTD = model.hidden(**batch.inputs).float()
    assert batch.document_ids_BT is not None
    # padding goes to a column of its own, which is cut off
    columns_BT = torch.where(batch.document_ids_BT > 0, batch.document_ids_BT - 1, batch.sequences)
    sums_BSD = hidden_BTD.new_zeros(hidden_BTD.shape[0], batch.sequences + 1, hidden_BTD.shape[-1])
    sums_BSD = sums_BSD.scatter_add(1, columns_BT[..., None].expand_as(hidden_BTD), hidden_BTD)
    # a mean is a sum up to its length, which is made 1
    return normalize(context.sum_over_context(sums_BSD[:, :-1]), dim=-1)


def info_nce(vectors_BSD: Tensor, role_BS: Tensor, group_BS: Tensor, text_BS: Tensor, temperature: float) -> Tensor:
    """−log softmax of the right passage's cosine over those of all passages of the row, for each question, (B, S), in nats; 0
    for texts that are no question.

    vectors_BSD: of length 1. role_BS: QUERY, POSITIVE or NEGATIVE. group_BS: equal for a question and its passage. text_BS:
    equal for passages of one text; a question has that of its passage, so that its copies are left out.
    """
    scores_BSS = vectors_BSD @ vectors_BSD.mT / temperature
    is_query_BS1, is_passage_B1S = (role_BS == QUERY)[:, :, None], (role_BS >= POSITIVE)[:, None, :]
    is_right_BSS = is_query_BS1 & (role_BS == POSITIVE)[:, None, :] & (group_BS[:, :, None] == group_BS[:, None, :])
    is_copy_BSS = (text_BS[:, :, None] == text_BS[:, None, :]) & ~is_right_BSS
    compared_BSS = scores_BSS.masked_fill(~is_passage_B1S | is_copy_BSS, -torch.inf)
    has_right_BS = is_right_BSS.any(-1)
    right_BS = scores_BSS.masked_fill(~is_right_BSS, 0).sum(-1)
    # rows without a passage would give −∞ − −∞
    totals_BS = compared_BSS.masked_fill(~has_right_BS[:, :, None], 0).logsumexp(-1)
    return torch.where(has_right_BS, totals_BS - right_BS, 0)


class ContrastiveObjective(Objective):
    """Mean of `info_nce` over questions. Logged: `accuracy`, the share of questions whose passage is the nearest of the row."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return {"contrastive": Count(float((batch.per_sequence["role"] == QUERY).sum()), "sequence")}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        of = batch.per_sequence
        vectors_BSD = pooled(model, batch, context)
        losses_BS = info_nce(vectors_BSD, of["role"], of["group"], of["text"], self._temperature)
        with torch.no_grad():
            is_query_BS = of["role"] == QUERY
            right = context.once((is_nearest(vectors_BSD, of["role"], of["group"], of["text"]) & is_query_BS).sum().float())
            accuracy = Metric(right, context.once(is_query_BS.sum().float()))
        return Terms({"contrastive": context.once(losses_BS.sum())}, {"accuracy": accuracy})


def is_nearest(vectors_BSD: Tensor, role_BS: Tensor, group_BS: Tensor, text_BS: Tensor) -> Tensor:
    """Whether each question's passage, or a copy of it, is the nearest passage of its row, (B, S) bool."""
    scores_BSS = (vectors_BSD @ vectors_BSD.mT).masked_fill((role_BS < POSITIVE)[:, None, :], -torch.inf)
    nearest_BS = scores_BSS.argmax(-1)
    return (role_BS == QUERY) & (text_BS.gather(1, nearest_BS) == text_BS)
