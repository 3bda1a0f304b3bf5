"""The objectives of distillation.

Shapes: B rows, T tokens of a row, N tokens of all rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.decoder import Decoder
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.losses import (
    DistillationLoss,
    DivergenceSettings,
    HeadStates,
    of_one_vocabulary,
    reverse_kl,
)
from bessemer.posttraining.distillation.registry import DISTILLATION_LOSSES
from bessemer.posttraining.distillation.teacher import TEACHER, TeacherHead, hidden_states, with_teacher
from bessemer.posttraining.rl.aggregation import TOKEN_MEAN
from bessemer.posttraining.rl.corrections import TRUNCATE
from bessemer.posttraining.rl.objective import ADVANTAGES, SAMPLER, PolicyObjective, PolicySettings
from bessemer.posttraining.rl.policy_losses import IMPORTANCE
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.head import linear_cross_entropy
from bessemer.training.objectives import POLICY, Count, LossContext, Metric, Objective, Terms, token_losses
from bessemer.training.trainee import Trainee

#: Of tokens that the student sampled: log π − log π_teacher.
LOG_RATIOS = "teacher_log_ratios"


class DistillationObjective(Objective):
    """Mean over the targets of a divergence between the student's and the teacher's distributions of the next token, and
    perhaps, with a weight, their cross-entropy beside it."""

    def __init__(
        self,
        loss: DistillationLoss,
        teacher: TeacherHead,
        settings: DivergenceSettings | None = None,
        next_token_weight: float = 0.0,
    ) -> None:
        self._loss = loss
        self._teacher = teacher
        self._settings = settings or DivergenceSettings()
        self._next_token_weight = next_token_weight

    @classmethod
    def of(cls, config: DistillationConfig, teacher: TeacherHead) -> DistillationObjective:
        """The objective of a stage's settings. Raises ConfigError for a loss that there is not."""
        settings = DivergenceSettings(config.temperature, config.beta, config.top_k)
        return cls(DISTILLATION_LOSSES.find(config.loss).load(), teacher, settings, config.next_token_weight)

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The number of targets, for every term."""
        terms = ["distillation", *(["next_token"] if self._next_token_weight else [])]
        return dict.fromkeys(terms, Count(batch.targets))

    def annotate(self, trainee: Trainee, batch: Batch) -> Batch:
        """With the teacher's hidden states."""
        return with_teacher(trainee, batch)

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's targets."""
        student, targets_N = student_states(model, batch), batch.targets_BT.flatten()
        pair = of_one_vocabulary(student, self._teacher.states(batch))
        sums = {"distillation": self._loss(*pair, targets_N != IGNORE_INDEX, self._settings).sum()}
        if self._next_token_weight:
            cross_entropy = linear_cross_entropy(student.hidden_ND, student.weight_VD, targets_N, student.softcap)
            sums["next_token"] = self._next_token_weight * cross_entropy
        return Terms(sums)

    def token_losses(self, model: Decoder, batch: Batch) -> Tensor:
        """−log p of each target: what losses by source are compared in, whatever is minimised."""
        return token_losses(model, batch)


class OnPolicyObjective(Objective):
    """The policy gradient of the student's own samples, whose tokens have the advantage −(log π − log π_teacher) (Lu and
    Thinking Machines Lab 2025, "On-policy distillation"), less its mean over the batch where `baseline` says so.

    Its mean over what the student may say next is the gradient of KL(student ‖ teacher) there; what a token does to those
    after it is not counted. A baseline leaves that mean as it is and takes noise off. Logged beside the policy's figures:
    `reverse_kl`, the mean of log π − log π_teacher.
    """

    guards_loss = PolicyObjective.guards_loss

    def __init__(self, temperature: float, answers: int, longest: int, *, baseline: bool = True) -> None:
        """temperature: of the samples. answers, longest: of a whole step, as of `PolicySettings`."""
        self._policy = PolicyObjective(
            IMPORTANCE,
            TOKEN_MEAN,
            TRUNCATE,
            PolicySettings(temperature, answers, longest),
        )
        self._temperature = temperature
        self._baseline = baseline

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The number of targets."""
        return self._policy.denominators(batch)

    def annotate(self, trainee: Trainee, batch: Batch) -> Batch:
        """With the log-ratios and the advantages of the targets."""
        is_target_BT = batch.targets_BT != IGNORE_INDEX
        teacher_BT = trainee.log_probs(batch, TEACHER, temperature=self._temperature)
        log_ratios_BT = (batch.per_token[SAMPLER] - teacher_BT) * is_target_BT
        advantages_BT = -log_ratios_BT
        if self._baseline:
            mean = log_ratios_BT.sum() / is_target_BT.sum().clamp(min=1)
            advantages_BT = (mean - log_ratios_BT) * is_target_BT
        return batch.with_values(per_token={ADVANTAGES: advantages_BT, LOG_RATIOS: log_ratios_BT})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """Sums over the micro-batch's tokens."""
        terms = self._policy(model, batch, context)
        reverse = Metric(batch.per_token[LOG_RATIOS].sum(), (batch.targets_BT != IGNORE_INDEX).sum())
        return terms._replace(metrics={**terms.metrics, "reverse_kl": reverse})


def student_states(model: Decoder, batch: Batch) -> HeadStates:
    """The student's distributions of the tokens of a micro-batch."""
    return HeadStates(hidden_states(model, batch).flatten(0, 1), model.head_weight, model.logit_softcap)


@torch.no_grad()
def mean_reverse_kl(trainee: Trainee, batch: Batch, teacher: TeacherHead, temperature: float) -> float:
    """KL(student ‖ teacher) of the next token, the mean over the targets of a batch, in nats, at a temperature."""

    def of_targets(model: Decoder, micro_batch: Batch) -> Tensor:
        pair = of_one_vocabulary(student_states(model, micro_batch), teacher.states(micro_batch))
        is_target_N = micro_batch.targets_BT.flatten() != IGNORE_INDEX
        divergence_N = reverse_kl(*pair, is_target_N, DivergenceSettings(temperature))
        return divergence_N.view_as(micro_batch.targets_BT)

    divergence_BT = trainee.per_token(POLICY, with_teacher(trainee, batch), of_targets)
    return float(divergence_BT.double().sum()) / batch.targets
