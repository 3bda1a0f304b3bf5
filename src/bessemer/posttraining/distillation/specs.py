"""The stage `distillation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.distillation import report
from bessemer.posttraining.distillation.config import DISTILLATION_VERSION, DistillationConfig
from bessemer.training.specs import model_not_merged, training_arguments, training_stage

_NO_TEACHER = (
    "the model would be its own teacher; name another one: from: {teacher: STAGE}, or the setting teacher: a model's folder"
)


def _teacher(config: DistillationConfig, inputs: Mapping[str, Path], folder: Path) -> Path:
    if config.teacher is None:
        return inputs["teacher"]
    from bessemer.posttraining.distillation.teacher import teacher_folder

    return teacher_folder(config.teacher, folder)


def _distillation(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.distillation.stage import distill

    teacher = _teacher(context.config, context.inputs, context.folder)
    if teacher == context.inputs["model"]:
        raise ConfigError(_NO_TEACHER)
    return distill(
        context.config,
        context.inputs["model"],
        teacher,
        context.out,
        tokens=context.inputs.get("tokens"),
        tasks=context.services.tasks,
        **training_arguments(context),
    )


def _fingerprint(config: DistillationConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint

    found: dict[str, Any] = {"data": files_fingerprint(config.data, outside.folder)}
    if config.teacher is not None:
        from bessemer.posttraining.distillation.teacher import teacher_fingerprint

        found["teacher"] = teacher_fingerprint(config.teacher, outside.folder)
    return found


def _unread(config: DistillationConfig) -> frozenset[str]:
    return frozenset([*(["teacher"] if config.teacher else []), *(["tokens"] if config.data else [])])


def _own_teacher(config: DistillationConfig, inputs: Mapping[str, Path], cache: Path) -> str | None:
    """Said as soon as the model is made that `from` chose for both roles, or that both have for want of another."""
    return _NO_TEACHER if "teacher" in inputs and inputs.get("teacher") == inputs.get("model") else None


STAGES = (
    training_stage(
        kind="distillation",
        summary="Train the model on what a larger one knows: its distributions, its answers, its view of the model's own.",
        config=DistillationConfig,
        version=DISTILLATION_VERSION,
        needs={"model": "model", "teacher": "model", "tokens": "tokens"},
        unread=_unread,
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="distillation: {data: [prompts.jsonl], answers: student, loss: policy_gradient}",
        report=report.report,
        summary_line=report.summary_line,
        run=_distillation,
        fingerprint=_fingerprint,
        unusable=_own_teacher,
    ),
)
