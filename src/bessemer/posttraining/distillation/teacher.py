"""The teacher: a model's folder, looked at before it is opened, and its head beside a student's."""

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
from bessemer.model.families.parts import Part
from bessemer.model.folder_config import CONFIG, read_model_config
from bessemer.model.formats.hub import import_advice
from bessemer.model.stored_tensors import EMBEDDING, HEAD, find_tensors, read_parts
from bessemer.posttraining.chat_models.files import place_fingerprint
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.losses import HeadStates
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.training.data.batches import Batch
from bessemer.training.trainee import Trainee

#: The role of the model that is learnt from.
TEACHER = "teacher"
#: Its hidden states in a batch, (B, T, D).
TEACHER_HIDDEN = "teacher_hidden"


def teacher_folder(path: str, folder: Path) -> Path:
    """The folder that the setting `teacher` means; a relative path starts from `folder`. A run's or a stage's will do.

    Raises ConfigError when it holds no model.
    """
    place = Path(os.path.normpath(folder.resolve() / path))
    for found in (follow(place), follow(place / "model")):
        if (found / CONFIG).is_file():
            return found
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
    """What turns a teacher's hidden states into its distributions: the whole matrix, on every process."""

    weight_VD: Tensor
    softcap: float | None

    @classmethod
    def of(cls, teacher: Decoder, mesh: Mesh) -> TeacherHead:
        """Of a teacher that is whole here and not yet sharded. The copy that other processes would share stays whole here."""
        weight_VD = teacher.head_weight.detach()
        return cls(weight_VD if mesh.alone else weight_VD.clone(), teacher.logit_softcap)

    @classmethod
    def read(cls, teacher: Path, device: str) -> TeacherHead:
        """Of a teacher's folder, in float32: nothing but this matrix is read. Raises ArtefactError as `find_tensors`."""
        stored = find_tensors(teacher, read_model_config(teacher))
        name = HEAD if HEAD in stored.shapes else EMBEDDING
        weight_VD = torch.empty(stored.shapes[name])
        read_parts(stored, {name: [Part(weight_VD, (0, 0))]})
        return cls(weight_VD.to(device), stored.config.final_logit_softcapping)

    def states(self, batch: Batch) -> HeadStates:
        """The teacher's distributions of the tokens of a batch that holds its hidden states."""
        return HeadStates(batch.per_token[TEACHER_HIDDEN].flatten(0, 1), self.weight_VD, self.softcap)


def with_teacher(trainee: Trainee, batch: Batch) -> Batch:
    """A batch with the teacher's hidden states of its tokens: far fewer numbers than its distributions."""
    return batch.with_values(per_token={TEACHER_HIDDEN: trainee.per_token(TEACHER, batch, hidden_states)})


def hidden_states(model: Decoder, batch: Batch) -> Tensor:
    """The hidden states of a model for a micro-batch, (B, T, D)."""
    return model.hidden(**batch.inputs)
