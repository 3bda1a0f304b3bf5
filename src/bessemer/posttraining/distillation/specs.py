"""The stage `distillation` for the pipeline, and its section of the report: how far the student is from its teacher, and
curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.distillation.config import DISTILLATION_VERSION, DistillationConfig
from bessemer.posttraining.sft.report import metric_curves
from bessemer.training.report import diagnostics, task_accuracies, training_curves
from bessemer.training.specs import model_not_merged, training_arguments, training_stage

#: Title of a chart → the metrics that are its curves, with the factor of their values.
_CHARTS = {
    "KL(student ‖ teacher) on the student's own answers, nats per token": (("reverse_kl",), 1.0),
    "Tokens of an answer": (("completion_tokens",), 1.0),
    "Entropy of a token, nats": (("entropy",), 1.0),
    "Share of answers that were cut, %": (("cut_share",), 100.0),
    "Log-probabilities of trainer and sampler: mean distance, nats": (("log_ratio",), 1.0),
}


def report(stage: StageReport) -> Section:
    """Divergences from the teacher, on what is learnt and on what is held out, and the curves of training."""
    parts: list[Part] = [
        Text(
            "The model, the student, learns from another one, its teacher. How far it still is from it is best seen on the "
            "student's own answers to prompts held out: there it will be used, and there its mistakes add up.",
            lead=True,
        ),
        *metric_curves(stage.records, _CHARTS),
        *training_curves(stage.records, loss="Loss, nats per token"),
        *task_accuracies(stage.records),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Distillation"), parts)


def summary_line(metrics: Metrics) -> str:
    """The number of steps, and where the student ended beside its teacher."""
    if "steps" not in metrics:
        return ""
    line = f"{metrics['steps']:,} steps"
    if "teacher_bits_per_byte" in metrics:
        return f"{line}, {metrics['bits_per_byte']:.3f} bits per byte, the teacher's {metrics['teacher_bits_per_byte']:.3f}"
    if "validation_reverse_kl" in metrics:
        return f"{line}, {metrics['validation_reverse_kl']:.3f} nats per token from the teacher on its own answers"
    return line


_NO_TEACHER = (
    "the model would be its own teacher; name another one: from: {teacher: STAGE}, or the setting teacher: a model's folder"
)


def _teacher(config: DistillationConfig, inputs: Mapping[str, Path], folder: Path) -> Path | None:
    """The teacher's folder; None where a server has it."""
    if config.teacher_server is not None:
        return None
    if config.teacher is None:
        return inputs["teacher"]
    from bessemer.posttraining.distillation.objective import teacher_folder

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
        **training_arguments(context),
    )


def _fingerprint(config: DistillationConfig, outside: Outside) -> Any:
    from bessemer.posttraining.data.examples import files_fingerprint

    fingerprints: dict[str, Any] = {"data": files_fingerprint(config.data, outside.folder)}
    if config.teacher is not None:
        from bessemer.posttraining.distillation.objective import teacher_fingerprint

        fingerprints["teacher"] = teacher_fingerprint(config.teacher, outside.folder)
    return fingerprints


def _unread(config: DistillationConfig) -> frozenset[str]:
    named = config.teacher or config.teacher_server
    return frozenset([*(["teacher"] if named else []), *(["tokens"] if config.data else [])])


def _own_teacher(config: DistillationConfig, inputs: Mapping[str, Path], cache: Path) -> str | None:
    """Why a model cannot be its own teacher, known as soon as it is made."""
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
        report=report,
        summary_line=summary_line,
        run=_distillation,
        fingerprint=_fingerprint,
        unusable=_own_teacher,
    ),
)
