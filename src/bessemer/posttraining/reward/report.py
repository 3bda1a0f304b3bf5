"""Report of the stage `reward`: accuracy, calibration and length bias on pairs held out, and curves of training."""

from __future__ import annotations

from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.posttraining.curves import metric_curves
from bessemer.posttraining.reward.assessment import assessment_parts, read_scored_pairs
from bessemer.training.report import diagnostics, training_curves

#: The scored pairs in the stage's folder.
HELD_OUT = "held_out.jsonl"

#: Title of a chart → the metrics that are its curves, with the factor of their values.
_CHARTS = {
    "Pairs whose chosen answer has the higher reward, %": (("accuracy",), 100.0),
    "Reward, mean": (("reward_chosen", "reward_rejected"), 1.0),
}


def report(stage: StageReport) -> Section:
    """Figures of the pairs held out, and curves of the training."""
    parts: list[Part] = [
        Text(
            "The model learns to give the better of two answers the higher reward, so that answers can be chosen, or another "
            "model trained, by it. It knows what its pairs show: a model that is trained hard against it finds what it gets "
            "wrong.",
            lead=True,
        ),
        *metric_curves(stage.records, _CHARTS),
        *assessment_parts(read_scored_pairs(stage.folder / HELD_OUT)),
        *training_curves(stage.records, loss="Loss of a pair"),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Reward model"), parts)


def summary_line(metrics: Metrics) -> str:
    """Pairs, and the accuracy on held-out ones with its interval."""
    if "pairs" not in metrics:
        return ""
    if "held_out_accuracy" not in metrics:
        return f"{metrics['pairs']:,} pairs"
    low, high = metrics["held_out_accuracy_low"], metrics["held_out_accuracy_high"]
    return (
        f"{metrics['pairs']:,} pairs, {metrics['held_out_accuracy']:.0%} [{low:.0%}, {high:.0%}] of {metrics['held_out']:,} "
        "held out told apart"
    )
