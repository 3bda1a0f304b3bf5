"""The teacher, and the objectives of a student beside it.

The teacher is a model's folder, checked before it is opened; its head stands beside the student's.

Shapes: B rows, T tokens of a row, N tokens of all rows, D hidden.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.store import follow, read_json
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import TensorBox
from bessemer.model.storage.library import import_advice
from bessemer.model.storage.model_config import CONFIG, read_model_config
from bessemer.model.storage.weights import EMBEDDING, HEAD, find_tensors, read_boxes
from bessemer.posttraining.chat_models import place_fingerprint
from bessemer.posttraining.distillation.config import DISTILLATION_LOSSES, DistillationConfig
from bessemer.posttraining.distillation.losses import (
    DistillationLoss,
    DivergenceSettings,
    HeadStates,
    of_one_vocabulary,
    reverse_kl,
)
from bessemer.posttraining.rl.losses import IMPORTANCE, TOKEN_MEAN, TRUNCATE
from bessemer.posttraining.rl.objective import PolicyObjective, PolicySettings
from bessemer.posttraining.sampling.samples import ADVANTAGES, SAMPLER, of_all_rows
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import linear_cross_entropy
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms, token_losses

#: The role of the teacher.
TEACHER = "teacher"
#: Key of the teacher's hidden states in a batch, (B, T, D).
TEACHER_HIDDEN = "teacher_hidden"


def teacher_folder(path: str, folder: Path) -> Path:
    """The folder that the setting `teacher` means; a relative path starts from `folder`. A run's or a stage's will do.

    Raises ConfigError when it holds no model.
    """
    place = Path(os.path.normpath(folder.resolve() / path))
    for folder in (follow(place), follow(place / "model")):
        if (folder / CONFIG).is_file():
            return folder
    if not follow(place).exists():
        raise ConfigError(f"teacher: {path}: no such folder{import_advice(path)}")
    raise ConfigError(f"teacher: {path}: not a model's folder (it has no {CONFIG})")


def teacher_fingerprint(path: str, folder: Path) -> dict[str, str]:
    """Hashes of the files of the teacher that the settings name, its chat template among them. Raises as `teacher_folder`."""
    return place_fingerprint(teacher_folder(path, folder))


def same_vocabulary(student: Path, teacher: Path) -> bool:
    """Whether ids mean the same to the models of two folders: the vocabularies of their tokenizers are equal."""
    first, second = (read_json(folder / TOKENIZER_FILE) for folder in (student, teacher))
    return all(first.get(part) == second.get(part) for part in ("model", "added_tokens"))


def incomparable(config: DistillationConfig, student: Path, teacher: Path) -> str | None:
    """Why the distributions of a teacher cannot be compared with a student's: it has another vocabulary, or a context that is
    shorter than the rows. None when they can."""
    if not same_vocabulary(student, teacher):
        return (
            f"teacher: {teacher} has another vocabulary than the model, so that their distributions cannot be compared; learn "
            "from what it writes instead: answers: teacher and loss: cross_entropy"
        )
    longest = read_model_config(teacher).max_position_embeddings
    if config.context_length > longest:
        return f"context_length {config.context_length:,} exceeds the teacher's context of {longest:,}; lower it"
    return None


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's output matrix, whole on every process, which gives its distributions."""

    weight_VD: Tensor
    softcap: float | None

    @classmethod
    def of(cls, teacher: Decoder, mesh: Mesh) -> TeacherHead:
        """The head of a teacher that is whole here and not yet sharded. The copy that other processes would share stays whole
        here."""
        weight_VD = teacher.head_weight.detach()
        return cls(weight_VD if mesh.alone else weight_VD.clone(), teacher.logit_softcap)

    @classmethod
    def read(cls, teacher: Path, device: str) -> TeacherHead:
        """The head of a teacher's folder, in float32: no other tensor is read. Raises ArtefactError as `find_tensors`."""
        stored = find_tensors(teacher, read_model_config(teacher))
        name = HEAD if HEAD in stored.shapes else EMBEDDING
        weight_VD = torch.empty(stored.shapes[name])
        read_boxes(stored, {name: [TensorBox(weight_VD, (0, 0))]})
        return cls(weight_VD.to(device), stored.config.final_logit_softcapping)

    def states(self, batch: Batch) -> HeadStates:
        """The teacher's distributions of the tokens of a batch that holds its hidden states."""
        return HeadStates(batch.per_token[TEACHER_HIDDEN].flatten(0, 1), self.weight_VD, self.softcap)


def with_teacher(models: ModelRoles, batch: Batch) -> Batch:
    """A batch with the teacher's hidden states of its tokens: far fewer numbers than its distributions."""
    return batch.with_values(per_token={TEACHER_HIDDEN: models.per_token(TEACHER, batch, hidden_states)})


def hidden_states(model: Decoder, batch: Batch) -> Tensor:
    """The hidden states of a model for a micro-batch, (B, T, D)."""
    return model.hidden(**batch.inputs)


#: Keys of values of the tokens that the student sampled: log π − log π_teacher; log π_teacher, where a server has given it.
LOG_RATIOS, TEACHER_LOG_PROBS = "teacher_log_ratios", "teacher_log_probs"


class DistillationObjective(Objective):
    """A divergence between the student's and the teacher's distributions of the next token, as a mean over the targets; where
    its weight is not 0, the targets' cross-entropy is added."""

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
        """The objective of a stage's settings. Raises ConfigError for an unknown loss."""
        settings = DivergenceSettings(config.temperature, config.beta, config.top_k)
        return cls(DISTILLATION_LOSSES.find(config.loss).load(), teacher, settings, config.next_token_weight)

    def denominators(self, batch: Batch) -> dict[str, Count]:
        terms = ["distillation", *(["next_token"] if self._next_token_weight else [])]
        return dict.fromkeys(terms, Count(batch.targets))

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """Add the teacher's hidden states."""
        return with_teacher(models, batch)

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        student, targets_N = student_states(model, batch), batch.targets_BT.flatten()
        pair = of_one_vocabulary(student, self._teacher.states(batch))
        sums = {"distillation": self._loss(*pair, targets_N != IGNORE_INDEX, self._settings).sum()}
        if self._next_token_weight:
            cross_entropy = linear_cross_entropy(student.hidden_ND, student.weight_VD, targets_N, student.softcap)
            sums["next_token"] = self._next_token_weight * cross_entropy
        return Terms(sums)

    def token_losses(self, model: Decoder, batch: Batch) -> Tensor:
        """−log p of each target: losses by source are compared in this, whichever loss is minimised."""
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
        """temperature: of the samples. answers, longest: of a whole step, as in `PolicySettings`."""
        self._policy = PolicyObjective(
            IMPORTANCE,
            TOKEN_MEAN,
            TRUNCATE,
            PolicySettings(temperature, answers, longest),
        )
        self._temperature = temperature
        self._baseline = baseline

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return self._policy.denominators(batch)

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """Add log-ratios and advantages of the targets."""
        is_target_BT = batch.targets_BT != IGNORE_INDEX
        teacher_BT = batch.per_token.get(TEACHER_LOG_PROBS)
        if teacher_BT is None:
            teacher_BT = models.log_probs(batch, TEACHER, temperature=self._temperature)
        log_ratios_BT = (batch.per_token[SAMPLER] - teacher_BT) * is_target_BT
        advantages_BT = -log_ratios_BT
        if self._baseline:
            # of the whole batch, whose rows lie on several processes
            sums_2 = torch.stack((log_ratios_BT.sum().double(), is_target_BT.sum().double()))
            total, count = models.mesh.sum(sums_2)
            mean = (total / count.clamp(min=1)).to(log_ratios_BT.dtype).to(log_ratios_BT.device)
            advantages_BT = (mean - log_ratios_BT) * is_target_BT
        return batch.with_values(per_token={ADVANTAGES: advantages_BT, LOG_RATIOS: log_ratios_BT})

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        terms = self._policy(model, batch, context)
        reverse = Metric(batch.per_token[LOG_RATIOS].sum(), (batch.targets_BT != IGNORE_INDEX).sum())
        return terms._replace(metrics={**terms.metrics, "reverse_kl": reverse})


def student_states(model: Decoder, batch: Batch) -> HeadStates:
    """The student's distributions of the tokens of a micro-batch."""
    return HeadStates(hidden_states(model, batch).flatten(0, 1), model.head_weight, model.logit_softcap)


@torch.no_grad()
def mean_reverse_kl(models: ModelRoles, batch: Batch, teacher: TeacherHead, temperature: float) -> float:
    """KL(student ‖ teacher) of the next token, the mean over the targets of a batch, in nats, at a temperature. batch: the same
    on every process, each of which computes its rows."""

    def of_targets(model: Decoder, micro_batch: Batch) -> Tensor:
        pair = of_one_vocabulary(student_states(model, micro_batch), teacher.states(micro_batch))
        is_target_N = micro_batch.targets_BT.flatten() != IGNORE_INDEX
        divergence_N = reverse_kl(*pair, is_target_N, DivergenceSettings(temperature))
        return divergence_N.view_as(micro_batch.targets_BT)

    divergence_BT = of_all_rows(models, batch, lambda rows: models.per_token(POLICY, with_teacher(models, rows), of_targets))
    return float(divergence_BT.double().sum()) / batch.targets
