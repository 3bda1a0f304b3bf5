"""Training objectives: next-token cross-entropy with multi-token prediction and router losses, and the loss by source.

The cross-entropy of the head never holds the logits of a whole batch. They are by far the largest tensor of a small model's
step: at 2,048 tokens and a vocabulary of 4,096 they take 34 MB, and the usual path keeps them, their softmax and their
gradient. Here they are computed for a chunk of tokens at a time, small enough to stay in the processor's cache, and turned
into the loss and both gradients at once. With a vocabulary sharded over the ranks of an axis, each rank computes the logits of
its shard, and the ranks exchange three numbers a token.

Shapes: N tokens of all rows, C tokens of a chunk, D hidden, V vocabulary, B rows, T time, S sources.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from bessemer.distributed.differentiable import copy_to_ranks
from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.moe_losses import router_losses

#: What training minimises: a scalar of a model and a batch.
Objective = Callable[[Decoder, Batch], Tensor]

#: Logits held at a time: 1M elements, 256 tokens at a vocabulary of 4,096; fewer leave the matmuls too thin.
_CHUNK_ELEMENTS = 1 << 20


def build_objective(config: LoopConfig) -> Objective:
    """The objective that a run's settings name."""
    return partial(next_token_loss, z_loss=config.z_loss)


def next_token_loss(model: Decoder, batch: Batch, *, z_loss: float = 0.0) -> Tensor:
    """Mean cross-entropy, in nats, of a batch's targets, plus what the model's settings add in training: the loss of
    multi-token prediction and the router losses. z_loss: as in `linear_cross_entropy`.
    """
    tokens_BT, positions_BT, documents_BT = batch.tokens_BT, batch.positions_BT, batch.document_ids_BT
    if not model.config.num_nextn_predict_layers:
        hidden_BTD = model.hidden(tokens_BT, positions_BT=positions_BT, document_ids_BT=documents_BT)
        return _cross_entropy(model, hidden_BTD, batch.targets_BT, z_loss) + router_losses(model, batch.targets_BT)
    hidden_BTD, mtp_hidden = model.hidden_and_mtp(tokens_BT, positions_BT=positions_BT, document_ids_BT=documents_BT)
    loss = _cross_entropy(model, hidden_BTD, batch.targets_BT, z_loss)
    num_targets = int((batch.targets_BT != IGNORE_INDEX).sum())
    for step, mtp_hidden_BTD in enumerate(mtp_hidden, start=1):
        targets_BT = mtp_targets(batch.targets_BT, documents_BT, step)
        # the sum over these targets over the number of next-token targets (DeepSeek-V3, eq. 24): so micro-batches add up
        share = int((targets_BT != IGNORE_INDEX).sum()) / max(num_targets, 1)
        loss = loss + MTP_LOSS_WEIGHT / len(mtp_hidden) * share * _cross_entropy(model, mtp_hidden_BTD, targets_BT, z_loss)
    return loss + router_losses(model, batch.targets_BT)


#: λ of DeepSeek-V3, section 2.2, as it was for most of its training.
MTP_LOSS_WEIGHT = 0.3


def mtp_targets(targets_BT: Tensor, document_ids_BT: Tensor | None, step: int) -> Tensor:
    """Targets of multi-token prediction, `step` tokens after the next-token targets, (B, T).

    -100 where they lie in another document or beyond the row, and for a token without a next-token target.
    """
    length = targets_BT.shape[1]
    further_BT = torch.full_like(targets_BT, IGNORE_INDEX)
    further_BT[:, : length - step] = targets_BT[:, step:]
    if document_ids_BT is not None:
        same_BT = document_ids_BT[:, step:] == document_ids_BT[:, : length - step]
        further_BT[:, : length - step].masked_fill_(~same_BT, IGNORE_INDEX)
    return further_BT.masked_fill_(targets_BT == IGNORE_INDEX, IGNORE_INDEX)


def _cross_entropy(model: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> Tensor:
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), model.logit_softcap, z_loss)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None, z_loss: float = 0.0
) -> Tensor:
    """Mean over targets of −log softmax(hidden · weightᵀ)[target], in nats, as a float32 scalar.

    targets_N: ids, or -100 for a token without a target; the mean is over the others, and zero, with zero gradients, when
    there are none. softcap: logits are first held within ±c by c·tanh(logits / c). z_loss: weight of the mean of
    (log Σ exp(logits))², which keeps that sum near 1 (PaLM, section 5; OLMo 2, section 3.2.2). Equals `F.cross_entropy` of
    the full logits in value and gradient. Matmuls run in autocast's dtype where autocast is on; sums are float32, or float64
    for float64 inputs.

    weight_VD: may be sharded by rows over one axis of a mesh, where every rank passes the same hidden states and targets and
    gets the same loss; its gradient is sharded alike.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    has_target_N = targets_N != IGNORE_INDEX
    if not bool(has_target_N.all()):
        hidden_ND, targets_N = hidden_ND[has_target_N], targets_N[has_target_N]
    group, first_id = None, 0
    if isinstance(weight_VD, DTensor):
        axis, (placement,) = weight_VD.device_mesh, weight_VD.placements
        assert placement.is_shard(0), placement
        hidden_ND, weight_VD, group = copy_to_ranks(hidden_ND, axis), weight_VD.to_local(), axis.get_group()
        first_id = axis.get_local_rank() * weight_VD.shape[0]
    with torch.autocast(kind, enabled=False):
        result: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, dtype, softcap, z_loss, group, first_id)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients during the forward pass, chunk by chunk, and only scales them in the backward pass.

    The softmax minus 1 at the target is the gradient of −log p[target] by the logits; (log Σ exp)² adds 2 log Σ exp times the
    softmax. With a sharded vocabulary each rank computes its shard of the softmax, and the gradients are those of its shard.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        z_loss: float,
        group: dist.ProcessGroup | None,
        first_id: int,
    ) -> Tensor:
        count, vocab_size = targets_N.numel(), weight_VD.shape[0]
        sums = torch.promote_types(dtype, torch.float32)
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        total = hidden.new_zeros((), dtype=sums)
        grad_hidden_ND, grad_weight_VD = torch.empty_like(hidden), torch.zeros_like(weight, dtype=sums)
        rows = max(1, min(count, _CHUNK_ELEMENTS // vocab_size))
        # allocated once and overwritten by every chunk: new memory from the system costs as much as the matmuls
        all_logits_CV, all_probs_CV = hidden.new_empty(rows, vocab_size), hidden.new_empty(rows, vocab_size)
        chunk_grad_VD = torch.empty_like(weight)
        index_C = torch.arange(rows, device=hidden.device)
        for start in range(0, count, rows):
            hidden_CD, ids_C = hidden[start : start + rows], targets_N[start : start + rows] - first_id
            is_local_C, chunk = torch.ones_like(ids_C, dtype=dtype), slice(0, len(ids_C))
            if group is not None:
                is_local_C = ((ids_C >= 0) & (ids_C < vocab_size)).to(dtype)
                ids_C = ids_C.where(is_local_C > 0, 0)
            logits_CV = torch.mm(hidden_CD, weight.T, out=all_logits_CV[chunk])
            if softcap is not None:
                logits_CV.div_(softcap).tanh_().mul_(softcap)
            target_C = (logits_CV[index_C[chunk], ids_C] * is_local_C).to(sums)
            probs_CV, log_sum_C, target_C = _softmax(logits_CV, target_C, all_probs_CV[chunk], group)
            total += (log_sum_C - target_C).sum() + z_loss * log_sum_C.square().sum()
            if any(context.needs_input_grad):
                if z_loss:
                    probs_CV *= (1 + 2 * z_loss * log_sum_C[:, None]).to(dtype)
                probs_CV[index_C[chunk], ids_C] -= is_local_C
                if softcap is not None:
                    # the derivative of the softcap
                    probs_CV *= 1 - (logits_CV / softcap).square()
                torch.mm(probs_CV, weight, out=grad_hidden_ND[start : start + rows])
                grad_weight_VD += torch.mm(probs_CV.T, hidden_CD, out=chunk_grad_VD)
        context.save_for_backward(grad_hidden_ND, grad_weight_VD)
        context.count = max(count, 1)
        context.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total / max(count, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = context.saved_tensors
        hidden_dtype, weight_dtype = context.dtypes
        scale = gradient / context.count
        gradients = (grad_hidden_ND * scale).to(hidden_dtype), (grad_weight_VD * scale).to(weight_dtype)
        return *gradients, None, None, None, None, None, None


def _softmax(
    logits_CV: Tensor, target_C: Tensor, out_CV: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax, log Σ exp(logits), and the target's logit, which is 0 on ranks without it.

    With m the largest logit and p the softmax, log Σ exp(logits) is m − log p[argmax], exact because p[argmax] ≥ 1/V.
    """
    sums = target_C.dtype
    largest_C = logits_CV.amax(-1).to(sums)
    if group is None:
        probs_CV = torch.softmax(logits_CV, -1, out=out_CV)
        return probs_CV, largest_C - probs_CV.amax(-1).to(sums).log(), target_C
    dist.all_reduce(largest_C, dist.ReduceOp.MAX, group)
    probs_CV = torch.sub(logits_CV, largest_C[:, None].to(logits_CV.dtype), out=out_CV).exp_()
    sum_and_target_2C = torch.stack((probs_CV.sum(-1, dtype=sums), target_C))
    dist.all_reduce(sum_and_target_2C, group=group)
    sum_C, target_C = sum_and_target_2C
    return probs_CV.div_(sum_C[:, None]), largest_C + sum_C.log(), target_C


#: Logits held at a time by `token_losses`, which takes no gradients.
_SCORING_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def token_losses(model: Decoder, batch: Batch) -> Tensor:
    """−log p of each target, (B, T) float32, in nats; zero where there is no target."""
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
    rows = max(1, _SCORING_CHUNK_ELEMENTS // model.config.vocab_size)
    losses = [
        cross_entropy(model.logits(hidden_CD).float(), targets_C, reduction="none", ignore_index=IGNORE_INDEX)
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(losses).view_as(batch.targets_BT)


def sums_by_source(losses_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of the losses of each source's targets, and their number, (S,) float64, in the order of `batch.source_names`.

    Sums of ranks and of batches with the same names add up; `mean_by_source` turns them into means by name.
    """
    assert batch.sources_BT is not None
    has_target_BT = batch.targets_BT != IGNORE_INDEX
    sources_N, count = batch.sources_BT[has_target_BT].long(), len(batch.source_names)
    sums_S = torch.zeros(count, dtype=torch.float64, device=losses_BT.device)
    sums_S.index_add_(0, sources_N, losses_BT[has_target_BT].double())
    return sums_S, torch.bincount(sources_N, minlength=count).double()


def mean_by_source(sums_S: Tensor, counts_S: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Mean loss, in nats per token, of each source that has any."""
    return {
        name: total / number for name, total, number in zip(names, sums_S.tolist(), counts_S.tolist(), strict=True) if number
    }
