"""Losses of distillation: divergences of the next-token distributions of a student and a teacher, token by token.

Both come as hidden states and a head, so that no logits of a whole batch exist (`training/head.py`). Both softmaxes are
taken at `temperature`; nothing is scaled by its square, as in TRL's `GKDTrainer`.

`top_k` keeps the k likeliest tokens of the teacher, T, apart, and the rest is one more outcome of probability r_T, as in
SDPO (Hübotter et al. 2026, arXiv 2601.20802):

    Σ_k t log(t / s) + r_T log(r_T / r_S),   r = 1 − Σ_k of the same distribution

To lump outcomes together never enlarges a divergence, so this is a lower bound of KL(T ‖ S), equal to it with k = V. Where
the k tokens are renormalised instead, the student is free to put any mass outside of them.

Shapes: N tokens of all rows, B tokens of a block, D hidden, V vocabulary, K of the teacher's likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bessemer.training.chunked_head import Head, HeadGradients, Workspace, spread, through_softcap_, without_masked
from bessemer.training.head import Divergence, head_divergence


def top_k_divergence(
    student_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_ND: Tensor,
    teacher_weight_VD: Tensor,
    k: int,
    *,
    mask_N: Tensor,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The divergence at each token, in nats, (N,), in float32, or float64 for a float64 student; zero, with no gradient, where
    the mask is False. Differentiable by the student. k: at most V count.

    Kept for the backward pass: the arguments of the student and some K numbers a token. Raises ValueError for vocabularies that
    differ or are sharded, k below 1 and a temperature that is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if student_weight_VD.shape[0] != teacher_weight_VD.shape[0]:
        raise ValueError(f"the student has {student_weight_VD.shape[0]} tokens and the teacher {teacher_weight_VD.shape[0]}")
    _, student_MD, teacher_MD = without_masked(mask_N, student_ND, teacher_ND.detach())
    student, student_MD, student_weight_VD = Head.of(student_MD, student_weight_VD, student_softcap, temperature)
    teacher, teacher_MD, teacher_weight_VD = Head.of(teacher_MD, teacher_weight_VD.detach(), teacher_softcap, temperature)
    if student.group is not None or teacher.group is not None:
        raise ValueError("the teacher's likeliest tokens are looked for in a whole vocabulary, not in shards of it")
    divergence_M: Tensor = _TopKDivergence.apply(
        student_MD, student_weight_VD, teacher_MD, teacher_weight_VD, student, teacher, min(k, len(student_weight_VD))
    )
    return spread(divergence_M, mask_N)


class _TopKDivergence(torch.autograd.Function):
    """By a logit of the student, the derivative is s − t for the k tokens, and s (1 − r_T / r_S) for the others."""

    @staticmethod
    def forward(
        context: Any,
        student_ND: Tensor,
        student_weight_VD: Tensor,
        teacher_ND: Tensor,
        teacher_weight_VD: Tensor,
        student: Head,
        teacher: Head,
        k: int,
    ) -> Tensor:
        hidden, weight = student_ND.to(student.dtype), student_weight_VD.to(student.dtype)
        teacher_hidden, teacher_weight = teacher_ND.to(teacher.dtype), teacher_weight_VD.to(teacher.dtype)
        workspace = Workspace(student, weight, len(hidden))
        teachers = Workspace(teacher, teacher_weight, len(hidden), student.float_dtype)
        log_sum_N1, divergence_N1, rest_ratio_N1 = student.zeros(3, hidden)
        ids_NK = torch.zeros(len(hidden), k, dtype=torch.int64, device=hidden.device)
        probs_NK = torch.zeros(len(hidden), k, dtype=student.float_dtype, device=hidden.device)
        for chunk in workspace.chunks():
            blocks = workspace.blocks(chunk, workspace.logits(hidden[chunk]))
            teacher_blocks = teachers.blocks(chunk, teachers.logits(teacher_hidden[chunk]))
            for (tokens, _, student_BV), (_, _, teacher_BV) in zip(blocks, teacher_blocks, strict=True):
                probs_BV = workspace.buffer("probabilities", student_BV)
                teacher_probs_BV = workspace.buffer("teacher's probabilities", student_BV)
                student.transform_(student_BV)
                teacher.transform_(teacher_BV)
                log_sum_N1[tokens] = student.log_softmax_(student_BV, probs_BV)
                teacher.log_softmax_(teacher_BV, teacher_probs_BV)
                log_probs_BK, ids_BK = teacher_BV.topk(k, dim=-1)
                ids_NK[tokens], probs_NK[tokens] = ids_BK, log_probs_BK.exp()
                apart_BK = probs_NK[tokens] * (log_probs_BK - student_BV.gather(-1, ids_BK))
                rest_B1, teacher_rest_B1 = (
                    values_BV.scatter_(-1, ids_BK, 0.0).sum(-1, keepdim=True) for values_BV in (probs_BV, teacher_probs_BV)
                )
                rest_B1.clamp_(min=torch.finfo(rest_B1.dtype).tiny)
                rest_ratio_N1[tokens] = teacher_rest_B1 / rest_B1
                rest_divergence_B1 = torch.xlogy(teacher_rest_B1, rest_ratio_N1[tokens])
                divergence_N1[tokens] = apart_BK.sum(-1, keepdim=True) + rest_divergence_B1
        context.save_for_backward(student_ND, student_weight_VD, log_sum_N1, rest_ratio_N1, ids_NK, probs_NK)
        context.student = student
        return divergence_N1.flatten()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        student_ND, student_weight_VD, log_sum_N1, rest_ratio_N1, ids_NK, probs_NK = context.saved_tensors
        student: Head = context.student
        hidden, weight = student_ND.to(student.dtype), student_weight_VD.to(student.dtype)
        workspace = Workspace(student, weight, len(hidden))
        needs = context.needs_input_grad
        gradients = HeadGradients(student, hidden, weight, of_hidden=needs[0], of_weight=needs[1])
        # by the logits divided by the temperature, then by the logits
        gradient_N1 = gradient_N[:, None] / student.temperature
        for chunk in workspace.chunks():
            logits_CV = workspace.logits(hidden[chunk])
            for tokens, logits_BV, student_BV in workspace.blocks(chunk, logits_CV):
                tanh_BV = workspace.tanh(student_BV)
                student.transform_(student_BV, tanh_BV)
                student_BV.sub_(log_sum_N1[tokens]).exp_()
                apart_BK = student_BV.gather(-1, ids_NK[tokens]) - probs_NK[tokens]
                student_BV.mul_(1 - rest_ratio_N1[tokens]).scatter_(-1, ids_NK[tokens], apart_BK)
                student_BV.mul_(gradient_N1[tokens])
                through_softcap_(student_BV, tanh_BV)
                logits_BV.copy_(student_BV)
            gradients.add(chunk, logits_CV)
        return *gradients.as_dtypes(student_ND.dtype, student_weight_VD.dtype), *[None] * 5


@dataclass(frozen=True)
class HeadStates:
    """The distributions of tokens: hidden states, (N, D), the head's matrix, (V, D), and its softcap."""

    hidden_ND: Tensor
    weight_VD: Tensor
    softcap: float | None = None


@dataclass(frozen=True)
class DivergenceSettings:
    """temperature: of both softmaxes. beta: of `jsd`. top_k: the teacher's likeliest tokens that `top_k` tells apart."""

    temperature: float = 1.0
    beta: float = 0.5
    top_k: int = 64


#: Arguments: student and teacher heads, mask (N,) bool, settings. Returns the loss per token, (N,), in nats, zero outside the
#: mask, differentiable by the student. Both have the same vocabulary.
DistillationLoss = Callable[[HeadStates, HeadStates, Tensor, DivergenceSettings], Tensor]


def forward_kl(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(T ‖ S) (Hinton et al. 2015): its gradient is that of the cross-entropy against the teacher's probabilities."""
    return _divergence("forward_kl", student, teacher, mask_N, settings)


def reverse_kl(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(S ‖ T) (Gu et al. 2024, MiniLLM): it penalises tokens that the teacher finds unlikely, and not the absence of some of
    the teacher's."""
    return _divergence("reverse_kl", student, teacher, mask_N, settings)


def jsd(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """β·KL(T ‖ M) + (1 − β)·KL(S ‖ M), M = β·T + (1 − β)·S (Agarwal et al. 2024, GKD); β 0 is the forward, β 1 the reverse
    KL."""
    return _divergence("jsd", student, teacher, mask_N, settings)


def top_k(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """The forward KL over k + 1 outcomes: the teacher's k likeliest tokens, and any other one."""
    return top_k_divergence(
        student.hidden_ND,
        student.weight_VD,
        teacher.hidden_ND,
        teacher.weight_VD,
        settings.top_k,
        mask_N=mask_N,
        temperature=settings.temperature,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
    )


def of_one_vocabulary(student: HeadStates, teacher: HeadStates) -> tuple[HeadStates, HeadStates]:
    """Both over the ids that both have: heads of one tokenizer are filled up to different numbers of rows, as Qwen2.5's of
    0.5B and of 7B parameters are."""
    size = min(len(student.weight_VD), len(teacher.weight_VD))
    first, second = (
        one if len(one.weight_VD) == size else replace(one, weight_VD=one.weight_VD[:size]) for one in (student, teacher)
    )
    return first, second


def _divergence(
    kind: Divergence, student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings
) -> Tensor:
    return head_divergence(
        student.hidden_ND,
        student.weight_VD,
        teacher.hidden_ND,
        teacher.weight_VD,
        kind,
        mask_N=mask_N,
        beta=settings.beta,
        temperature=settings.temperature,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
    )
