"""Losses of distillation: divergences of the next-token distributions of a student and a teacher, token by token.

Both come as hidden states and a head, so that no logits of a whole batch are ever there (`training/head.py`). At `temperature`
both softmaxes are taken; nothing is scaled by its square, as in TRL's `GKDTrainer`.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bessemer.posttraining.distillation.top_k import top_k_divergence
from bessemer.training.head import Divergence, head_divergence


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


#: From student, teacher, the tokens that count, (N,) bool, and settings to the loss of each token, (N,), in nats, zero where it
#: does not count; differentiable by the student. Both have the same vocabulary.
DistillationLoss = Callable[[HeadStates, HeadStates, Tensor, DivergenceSettings], Tensor]


def forward_kl(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(T ‖ S) (Hinton et al. 2015): its gradient is that of the cross-entropy against the teacher's probabilities."""
    return _divergence("forward_kl", student, teacher, mask_N, settings)


def reverse_kl(student: HeadStates, teacher: HeadStates, mask_N: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(S ‖ T) (Gu et al. 2024, MiniLLM): it costs to say what the teacher finds unlikely, and nothing to leave out a part of
    what it may say."""
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
