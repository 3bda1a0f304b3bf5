"""The stage `reward` for the pipeline, and its section of the report: accuracy, calibration and length bias on held-out pairs,
and curves.
"""

from __future__ import annotations

from typing import Any

from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.core.stage import StageContext
from bessemer.posttraining.data.made import PAIRS_NEEDS, made_paths, unread_pairs
from bessemer.posttraining.preference.specs import pairs_fingerprint
from bessemer.posttraining.rewards.assessment import HELD_OUT, assessment_parts, read_scored_pairs
from bessemer.posttraining.rewards.config import REWARD_VERSION, RewardConfig
from bessemer.posttraining.sft.report import metric_curves
from bessemer.training.report import diagnostics, training_curves
from bessemer.training.specs import resolved_by, training_arguments, training_stage

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
        "held out ranked correctly"
    )


def _reward(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.rewards.stage import reward

    return reward(
        context.config,
        context.inputs["model"],
        context.out,
        made=made_paths(context.inputs),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


STAGES = (
    training_stage(
        kind="reward",
        summary="Train a reward model on pairs of a preferred and a rejected answer.",
        config=RewardConfig,
        version=REWARD_VERSION,
        needs=dict(PAIRS_NEEDS),
        makes={"reward_model": "model"},
        links={"reward_model": "model"},
        example="reward: {data: [pairs.jsonl]}",
        budget_seconds=12,
        report=report,
        summary_line=summary_line,
        run=_reward,
        resolve=resolved_by(_reward),
        unread=unread_pairs,
        fingerprint=pairs_fingerprint,
    ),
)
