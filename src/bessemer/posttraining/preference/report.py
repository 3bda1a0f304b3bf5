"""Report of the stage `preference`: how well the model tells the answers apart, rewards, curves of training."""

from __future__ import annotations

from bessemer.core.report import Curves, Facts, Metrics, Part, Section, Series, StageReport, Text
from bessemer.training.report import diagnostics, task_accuracies, training_curves

#: Title of a chart → the metrics that are its curves, with the factor of their values.
_CHARTS = {
    "Pairs whose chosen answer has the higher implicit reward, %": (("accuracy",), 100.0),
    "Implicit reward, β times the log-ratio to the reference, in nats": (("reward_chosen", "reward_rejected"), 1.0),
    "Log-probability of the answers, nats per token": (("log_prob_chosen", "log_prob_rejected"), 1.0),
}


def report(stage: StageReport) -> Section:
    """Accuracy and rewards of the pairs, training and held out, and the curves that all methods have."""
    parts: list[Part] = [
        Text(
            "The model learns which of two answers people prefer. Its implicit reward of an answer is how much likelier it has "
            "become than under the reference, the model as it was before. The log-probabilities of both answers may fall: "
            "what is learnt is their difference.",
            lead=True,
        ),
        *(Curves(_series(stage, keys, factor), title) for title, (keys, factor) in _CHARTS.items()),
        *training_curves(stage.records),
        *task_accuracies(stage.records),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Preferences"), parts)


def _series(stage: StageReport, keys: tuple[str, ...], factor: float) -> list[Series]:
    """Each metric as it was on the batches and on the pairs held out."""
    series = []
    for key in keys:
        for name, of in ((key, "training"), (f"validation_{key}", "held out")):
            points = [(record["step"], factor * record[name]) for record in stage.records if name in record]
            if points:
                label = of if len(keys) == 1 else f"{key.rpartition('_')[2]}, {of}"
                series.append(Series(label, *zip(*points, strict=True)))
    return series


def summary_line(metrics: Metrics) -> str:
    """Pairs, and the share of held-out ones that the model tells apart."""
    if "pairs" not in metrics:
        return ""
    accuracy = metrics.get("validation_accuracy")
    held_out = "" if accuracy is None else f", {accuracy:.0%} of {metrics['held_out']:,} held out told apart"
    return f"{metrics['pairs']:,} pairs{held_out}"
