"""Losses of the head: cross-entropy, log-probabilities and divergences of hidden states, without the logits of a whole batch.

The logits are by far the largest tensor of a small model's step: at 2,048 tokens and a vocabulary of 4,096 they take 34 MB, and
the usual path keeps them, their softmax and their gradient. Here they are computed for a chunk of tokens at a time and turned
into the result and the gradients at once. `linear_cross_entropy` does both in the forward pass; the others, whose incoming
gradients differ by token, compute the logits again in the backward pass. With a vocabulary sharded over the ranks of an axis,
each rank computes the logits of its shard, and the ranks exchange a few numbers a token.

Matmuls run in autocast's dtype where autocast is on, else in the weight's. Softmax, losses and the gradient of the logits are
computed in float32, or float64 for float64 weights; the gradient is then rounded to the dtype of the matmuls.

Shapes: N tokens of all rows, C tokens of a chunk, B tokens of a block of it, D hidden, V vocabulary, of this rank; of whole
batches B rows, T tokens of a row.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid

from bessemer.model import batch_invariance
from bessemer.model.cpu_kernels.logits import cross_entropy_
from bessemer.model.decoder import Decoder
from bessemer.training.chunked_head import Head, HeadGradients, Workspace, spread, through_softcap_, without_masked
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.logit_chunks import chunk_size

#: KL(teacher ‖ student), KL(student ‖ teacher), and the generalised Jensen–Shannon divergence between the two.
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None, z_loss: float = 0.0
) -> Tensor:
    """Sum over targets of −log softmax(hidden · weightᵀ)[target], in nats, as a float32 scalar.

    targets_N: ids, or -100 for a token without a target; the sum is over the others, and zero, with zero gradients, when
    there are none. softcap: logits are first held within ±c by c·tanh(logits / c). z_loss: weight of the sum of
    (log Σ exp(logits))², which keeps Σ exp near 1 (PaLM, section 5; OLMo 2, section 3.2.2). Equals `F.cross_entropy` of
    the full logits in value and gradient. Float64 for a float64 weight.

    weight_VD: may be sharded by rows over one axis of a mesh, where every rank passes the same hidden states and targets and
    gets the same loss; its gradient is sharded alike.
    """
    counted_N, targets_N, hidden_ND = without_masked(targets_N != IGNORE_INDEX, targets_N, hidden_ND)
    head, hidden_ND, weight_VD = Head.of(hidden_ND, weight_VD, softcap)
    # checked here: inside an autograd function gradients are always off
    needs = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, weight_VD))
    result: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, counted_N, head, z_loss, needs)
    return result


def token_log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log p of each target, entropy of its distribution), with p = softmax(hidden · weightᵀ / temperature): in nats, (N,),
    differentiable, in float32, or float64 for a float64 weight.

    targets_N: ids, or -100 for a token without a target, whose log p, entropy and gradients are zero. softcap: logits are held
    within ±c by c·tanh(logits / c) before they are divided by the temperature, as in generation. Kept for the backward pass:
    the arguments and three numbers a token; the logits are computed again (Chen et al. 2016, arXiv 1604.06174, section 3). On a
    CPU also the probabilities, where they are few: to read them takes less time.

    weight_VD: may be sharded by rows over one axis of a mesh, where every rank passes the same hidden states and targets and
    continues with the same computation; its gradient is sharded alike. Raises ValueError unless the temperature is positive.
    """
    has_target_N = targets_N != IGNORE_INDEX
    _, targets_M, hidden_MD = without_masked(has_target_N, targets_N, hidden_ND)
    head, hidden_MD, weight_VD = Head.of(hidden_MD, weight_VD, softcap, temperature)
    # checked here: inside an autograd function gradients are always off
    few = len(hidden_MD) * len(weight_VD) <= chunk_size(head.device).max_kept_logits
    keeps = few and head.is_plain and torch.is_grad_enabled()
    log_probs_M, entropy_M = _TokenLogProbs.apply(hidden_MD, weight_VD, targets_M, head, keeps)
    return spread(log_probs_M, has_target_N), spread(entropy_M, has_target_N)


def target_log_probs(
    model: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` of a model's hidden states: (log p of each target, entropy of its distribution), (B, T); 0 where there
    is no target. Of a model that computes by batch-invariant kernels, log p has the bits of the engine's sampler."""
    hidden_ND, targets_N, softcap = hidden_BTD.flatten(0, 1), targets_BT.flatten(), model.logit_softcap
    log_probs_N, entropy_N = token_log_probs(hidden_ND, model.head_weight, targets_N, temperature=temperature, softcap=softcap)
    if model.is_batch_invariant:
        has_target_N = targets_N != IGNORE_INDEX
        exact_M = batch_invariance.target_log_probs(
            hidden_ND[has_target_N], model.head_weight, targets_N[has_target_N], temperature=temperature, softcap=softcap
        )
        log_probs_N = _WithValue.apply(log_probs_N, spread(exact_M, has_target_N))
    return log_probs_N.view_as(targets_BT), entropy_N.view_as(targets_BT)


class _WithValue(torch.autograd.Function):
    """The value of one computation with the derivative of another."""

    @staticmethod
    def forward(context: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def head_divergence(
    student_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_ND: Tensor,
    teacher_weight_VD: Tensor,
    kind: Divergence,
    *,
    mask_N: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Divergence between the next-token distributions of a student, S, and a teacher, T, at each token: in nats, (N,), in
    float32, or float64 for a float64 student. Differentiable by the student; the teacher gets no gradient.

    kind: "forward_kl" is KL(T ‖ S), "reverse_kl" KL(S ‖ T), and "jsd" the generalised Jensen–Shannon divergence
    β·KL(T ‖ M) + (1 − β)·KL(S ‖ M) with M = β·T + (1 − β)·S (Agarwal et al. 2024, arXiv 2306.13649, section 2); at β 0 it is
    the forward, at β 1 the reverse KL, the limits of the divergence over β and over 1 − β, as in TRL's `GKDTrainer`. Hidden
    widths may differ. Both softmaxes are taken at `temperature`, after the softcaps; the result is not scaled by its square.
    mask_N: True for tokens that count; the others are zero and have no gradient.

    The weights may both be sharded by rows over the same axis of a mesh, as in `token_log_probs`. Raises ValueError for
    vocabularies that differ, a teacher sharded otherwise, an unknown kind, β outside 0 to 1 and a temperature that is not
    positive.
    """
    if kind not in get_args(Divergence):
        raise ValueError(f"kind must be one of {', '.join(get_args(Divergence))}, got {kind}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}")
    if student_weight_VD.shape[0] != teacher_weight_VD.shape[0]:
        raise ValueError(f"the student has {student_weight_VD.shape[0]} tokens and the teacher {teacher_weight_VD.shape[0]}")
    if _sharding(student_weight_VD) != _sharding(teacher_weight_VD):
        raise ValueError("student and teacher must have the vocabulary sharded alike")
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    counted_N = torch.ones_like(student_ND[:, 0], dtype=torch.bool) if mask_N is None else mask_N
    _, student_ND, teacher_ND = without_masked(counted_N, student_ND, teacher_ND.detach())
    student, student_ND, student_weight_VD = Head.of(student_ND, student_weight_VD, student_softcap, temperature)
    teacher, teacher_ND, teacher_weight_VD = Head.of(teacher_ND, teacher_weight_VD.detach(), teacher_softcap, temperature)
    divergence_N: Tensor = _HeadDivergence.apply(
        student_ND, student_weight_VD, teacher_ND, teacher_weight_VD, student, teacher, kind, beta
    )
    return spread(divergence_N, counted_N)


def _sharding(weight_VD: Tensor) -> object:
    return (weight_VD.device_mesh, weight_VD.placements) if isinstance(weight_VD, DTensor) else None


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients during the forward pass, chunk by chunk, and only scales them in the backward pass.

    By a logit, the derivative of −log p[target] is the softmax, minus 1 at the target; that of (log Σ exp)² is 2 log Σ exp
    times the softmax. With a sharded vocabulary each rank computes its shard of the softmax, and the gradients are those of its
    shard.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        counted_N: Tensor,
        head: Head,
        z_loss: float,
        needs: tuple[bool, bool],
    ) -> Tensor:
        hidden, weight = hidden_ND.to(head.dtype), weight_VD.to(head.dtype)
        workspace = Workspace(head, weight, len(hidden))
        gradients = HeadGradients(head, hidden, weight, of_hidden=needs[0], of_weight=needs[1])
        ids_N1, is_local_N1 = head.local_ids(targets_N[:, None], len(weight))
        log_sum_N1, log_odds_N1 = head.zeros(2, hidden)
        for chunk in workspace.chunks():
            logits_CV = workspace.logits(hidden[chunk])
            if head.is_compiled:
                log_sums_and_odds = cross_entropy_(logits_CV, targets_N[chunk], z_loss=z_loss, wants_gradient=any(needs))
                log_sum_N1[chunk, 0], log_odds_N1[chunk, 0] = log_sums_and_odds
                if any(needs):
                    gradients.add(chunk, logits_CV)
                continue
            for tokens, logits_BV, values_BV in workspace.blocks(chunk, logits_CV):
                tanh_BV = workspace.tanh(values_BV) if any(needs) else None
                probs_BV = workspace.buffer("probabilities", values_BV)
                head.transform_(values_BV, tanh_BV)
                log_sum_B1, log_odds_B1 = head.softmax_of_others(values_BV, ids_N1[tokens], is_local_N1[tokens], probs_BV)
                log_sum_N1[tokens], log_odds_N1[tokens] = log_sum_B1, log_odds_B1
                if not any(needs):
                    continue
                of_target_B1 = -torch.sigmoid(-log_odds_B1)
                if z_loss:
                    of_log_sum_B1 = 2 * z_loss * log_sum_B1
                    of_target_B1 += of_log_sum_B1 * log_odds_B1.sigmoid()
                    probs_BV.mul_(1 + of_log_sum_B1)
                head.put_(probs_BV, ids_N1[tokens], of_target_B1, is_local_N1[tokens])
                through_softcap_(probs_BV, tanh_BV)
                logits_BV.copy_(probs_BV)
            gradients.add(chunk, logits_CV)
        context.save_for_backward(gradients.hidden_ND, gradients.weight_VD)
        context.dtypes = hidden_ND.dtype, weight_VD.dtype
        losses_N1 = z_loss * log_sum_N1.square() - logsigmoid(log_odds_N1)
        return losses_N1.masked_fill_(~counted_N[:, None], 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_and_weight = (
            None if saved is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(context.saved_tensors, context.dtypes, strict=True)
        )
        return *hidden_and_weight, None, None, None, None, None


class _TokenLogProbs(torch.autograd.Function):
    """H = −Σ p log p. By a logit, the derivative of log p[target] is 1 at the target, minus p; that of H is −p (log p + H)."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, head: Head, keeps: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, weight = hidden_ND.to(head.dtype), weight_VD.to(head.dtype)
        workspace = Workspace(head, weight, len(hidden))
        ids_N1, is_local_N1 = head.local_ids(targets_N[:, None], len(weight))
        log_sum_N1, log_odds_N1, others_N1 = head.zeros(3, hidden)
        # probabilities of all tokens but the target, whose entry is 0
        kept_NV = hidden.new_empty(len(hidden), len(weight)) if keeps else None
        for chunk in workspace.chunks():
            for tokens, _, values_BV in workspace.blocks(chunk, workspace.logits(hidden[chunk])):
                probs_BV = workspace.buffer("probabilities", values_BV) if kept_NV is None else kept_NV[tokens]
                head.transform_(values_BV)
                log_sum_N1[tokens], log_odds_N1[tokens] = head.softmax_of_others(
                    values_BV, ids_N1[tokens], is_local_N1[tokens], probs_BV
                )
                others_N1[tokens] = values_BV.sub_(log_sum_N1[tokens]).mul_(probs_BV).sum(-1, keepdim=True)
        log_probs_N1 = logsigmoid(log_odds_N1)
        entropy_N1 = -log_probs_N1.exp() * log_probs_N1 - head.all_reduce(others_N1)
        inputs = hidden_ND, weight_VD, ids_N1, is_local_N1
        context.save_for_backward(*inputs, log_sum_N1, log_probs_N1, entropy_N1, kept_NV)
        context.head = head
        context.set_materialize_grads(False)
        return log_probs_N1.flatten(), entropy_N1.flatten()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, of_log_probs_N: Tensor | None, of_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, log_sum_N1, log_probs_N1, entropy_N1, kept_NV = context.saved_tensors
        hidden_ND, weight_VD, ids_N1, is_local_N1 = inputs
        head: Head = context.head
        hidden, weight = hidden_ND.to(head.dtype), weight_VD.to(head.dtype)
        workspace = Workspace(head, weight, len(hidden))
        needs = context.needs_input_grad
        gradients = HeadGradients(head, hidden, weight, of_hidden=needs[0], of_weight=needs[1])
        # by the logits divided by the temperature, then by the logits
        of_log_probs_N1, of_entropy_N1 = (
            torch.zeros_like(log_sum_N1) if gradient_N is None else gradient_N[:, None] / head.temperature
            for gradient_N in (of_log_probs_N, of_entropy_N)
        )
        of_target_N1 = -of_log_probs_N1 * log_probs_N1.expm1()
        of_target_N1 -= of_entropy_N1 * log_probs_N1.exp() * (log_probs_N1 + entropy_N1)
        constant_N1 = -of_log_probs_N1 - of_entropy_N1 * entropy_N1
        for chunk in workspace.chunks():
            if kept_NV is not None and of_entropy_N is None:
                probs_CV = kept_NV[chunk]
                grad_CV = torch.mul(probs_CV, constant_N1[chunk], out=workspace.memory(len(probs_CV)))
                head.put_(grad_CV, ids_N1[chunk], of_target_N1[chunk], is_local_N1[chunk])
                gradients.add(chunk, grad_CV)
                continue
            logits_CV = workspace.logits(hidden[chunk])
            for tokens, logits_BV, values_BV in workspace.blocks(chunk, logits_CV):
                tanh_BV = workspace.tanh(values_BV)
                head.transform_(values_BV, tanh_BV)
                values_BV.sub_(log_sum_N1[tokens])
                if of_entropy_N is None:
                    values_BV.exp_().mul_(constant_N1[tokens])
                else:
                    probs_BV = torch.exp(values_BV, out=workspace.buffer("probabilities", values_BV))
                    values_BV.mul_(-of_entropy_N1[tokens]).add_(constant_N1[tokens]).mul_(probs_BV)
                head.put_(values_BV, ids_N1[tokens], of_target_N1[tokens], is_local_N1[tokens])
                through_softcap_(values_BV, tanh_BV)
                logits_BV.copy_(values_BV)
            gradients.add(chunk, logits_CV)
        return *gradients.as_dtypes(hidden_ND.dtype, weight_VD.dtype), None, None, None


class _HeadDivergence(torch.autograd.Function):
    """With s, t and m the log-probabilities of student, teacher and mixture, the derivative by a logit of the student is
    eˢ − eᵗ for the forward KL, eˢ (s − t − KL) for the reverse one, and (1 − β) eˢ (s − m − KL(S ‖ M)) for the Jensen–Shannon
    divergence, where those by way of m cancel."""

    @staticmethod
    def forward(
        context: Any,
        student_ND: Tensor,
        student_weight_VD: Tensor,
        teacher_ND: Tensor,
        teacher_weight_VD: Tensor,
        student: Head,
        teacher: Head,
        kind: Divergence,
        beta: float,
    ) -> Tensor:
        hidden, weight = student_ND.to(student.dtype), student_weight_VD.to(student.dtype)
        teacher_hidden, teacher_weight = teacher_ND.to(teacher.dtype), teacher_weight_VD.to(teacher.dtype)
        workspace = Workspace(student, weight, len(hidden))
        teachers = Workspace(teacher, teacher_weight, len(hidden), student.float_dtype)
        log_sum_N1, teacher_log_sum_N1, divergence_N1, of_student_N1 = student.zeros(4, hidden)
        for chunk in workspace.chunks():
            blocks = workspace.blocks(chunk, workspace.logits(hidden[chunk]))
            teacher_blocks = teachers.blocks(chunk, teachers.logits(teacher_hidden[chunk]))
            for (tokens, _, student_BV), (_, _, teacher_BV) in zip(blocks, teacher_blocks, strict=True):
                probs_BV = workspace.buffer("probabilities", student_BV)
                teacher_probs_BV = workspace.buffer("teacher's probabilities", student_BV)
                student.transform_(student_BV)
                teacher.transform_(teacher_BV)
                log_sum_N1[tokens] = student.log_softmax_(student_BV, probs_BV)
                teacher_log_sum_N1[tokens] = teacher.log_softmax_(teacher_BV, teacher_probs_BV)
                if kind == "forward_kl":
                    divergence_N1[tokens] = _kl_(teacher_BV, student_BV, teacher_probs_BV)
                elif kind == "reverse_kl":
                    divergence_N1[tokens] = of_student_N1[tokens] = _kl_(student_BV, teacher_BV, probs_BV)
                else:
                    mixture_BV = _log_mixture(student_BV, teacher_BV, beta, workspace)
                    of_student_N1[tokens] = (1 - beta) * _kl_(student_BV, mixture_BV, probs_BV)
                    of_teacher_B1 = beta * _kl_(teacher_BV, mixture_BV, teacher_probs_BV)
                    divergence_N1[tokens] = of_student_N1[tokens] + of_teacher_B1
        divergence_N1, of_student_N1 = student.all_reduce(torch.stack((divergence_N1, of_student_N1)))
        inputs = student_ND, student_weight_VD, teacher_ND, teacher_weight_VD
        context.save_for_backward(*inputs, log_sum_N1, teacher_log_sum_N1, of_student_N1)
        context.arguments = student, teacher, kind, beta
        return divergence_N1.flatten()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        student_ND, student_weight_VD, teacher_ND, teacher_weight_VD, *sums = context.saved_tensors
        log_sum_N1, teacher_log_sum_N1, of_student_N1 = sums
        student, teacher, kind, beta = context.arguments
        hidden, weight = student_ND.to(student.dtype), student_weight_VD.to(student.dtype)
        teacher_hidden, teacher_weight = teacher_ND.to(teacher.dtype), teacher_weight_VD.to(teacher.dtype)
        workspace = Workspace(student, weight, len(hidden))
        teachers = Workspace(teacher, teacher_weight, len(hidden), student.float_dtype)
        needs = context.needs_input_grad
        gradients = HeadGradients(student, hidden, weight, of_hidden=needs[0], of_weight=needs[1])
        # by the logits divided by the temperature, then by the logits
        gradient_N1 = gradient_N[:, None] / student.temperature
        for chunk in workspace.chunks():
            logits_CV = workspace.logits(hidden[chunk])
            blocks = workspace.blocks(chunk, logits_CV)
            teacher_blocks = teachers.blocks(chunk, teachers.logits(teacher_hidden[chunk]))
            for (tokens, logits_BV, student_BV), (_, _, teacher_BV) in zip(blocks, teacher_blocks, strict=True):
                tanh_BV = workspace.tanh(student_BV)
                student.transform_(student_BV, tanh_BV)
                teacher.transform_(teacher_BV)
                student_BV.sub_(log_sum_N1[tokens])
                teacher_BV.sub_(teacher_log_sum_N1[tokens])
                if kind == "forward_kl":
                    student_BV.exp_().sub_(teacher_BV.exp_())
                else:
                    probs_BV = torch.exp(student_BV, out=workspace.buffer("probabilities", student_BV))
                    if kind == "reverse_kl":
                        student_BV.sub_(teacher_BV)
                    else:
                        student_BV.sub_(_log_mixture(student_BV, teacher_BV, beta, workspace)).mul_(1 - beta)
                    student_BV.sub_(of_student_N1[tokens]).mul_(probs_BV)
                student_BV.mul_(gradient_N1[tokens])
                through_softcap_(student_BV, tanh_BV)
                logits_BV.copy_(student_BV)
            gradients.add(chunk, logits_CV)
        return *gradients.as_dtypes(student_ND.dtype, student_weight_VD.dtype), *[None] * 6


def _kl_(log_probs_BV: Tensor, others_BV: Tensor, probs_BV: Tensor) -> Tensor:
    """Σ p (log p − log q), (B, 1), of a rank's shard of the vocabulary. Overwrites log p."""
    return log_probs_BV.sub_(others_BV).mul_(probs_BV).sum(-1, keepdim=True)


def _log_mixture(student_BV: Tensor, teacher_BV: Tensor, beta: float, workspace: Workspace) -> Tensor:
    """log((1 − β)·S + β·T) of log-probabilities."""
    scaled_BV = torch.add(teacher_BV, math.log(beta), out=workspace.buffer("scaled", teacher_BV))
    mixture_BV = torch.add(student_BV, math.log1p(-beta), out=workspace.buffer("mixture", student_BV))
    return torch.logaddexp(mixture_BV, scaled_BV, out=mixture_BV)
