"""Losses of distillation by name. Imports no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.posttraining.distillation.losses import DistillationLoss

#: Plain tuning on what the teacher wrote, which asks for no distribution of its own.
CROSS_ENTROPY = "cross_entropy"
#: The policy gradient of the student's own samples, which is no divergence of two distributions.
POLICY_GRADIENT = "policy_gradient"

_LOSSES = "bessemer.posttraining.distillation.losses"

DISTILLATION_LOSSES: Registry[DistillationLoss] = Registry(
    "distillation loss",
    "bessemer.distillation_losses",
    [
        Plugin("forward_kl", "KL(teacher ‖ student): the student covers all that the teacher may say", f"{_LOSSES}:forward_kl"),
        Plugin("reverse_kl", "KL(student ‖ teacher): the student says what the teacher finds likely", f"{_LOSSES}:reverse_kl"),
        Plugin("jsd", "the generalised Jensen–Shannon divergence of GKD, between the two", f"{_LOSSES}:jsd"),
        Plugin("top_k", "forward KL of the teacher's likeliest tokens and of the rest as one", f"{_LOSSES}:top_k"),
    ],
)
