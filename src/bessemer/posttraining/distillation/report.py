"""Report of the stage `distillation`: how far the student is from its teacher, and the curves that all methods have."""

from __future__ import annotations

from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.posttraining.curves import metric_curves
from bessemer.training.report import diagnostics, task_accuracies, training_curves

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
