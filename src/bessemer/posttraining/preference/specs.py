"""The stage `preference` for the pipeline, and its section of the report: how well the model tells the answers apart, rewards,
curves.
"""

from __future__ import annotations

from typing import Any

from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.data.made import FORGETTING, MADE_PAIRS, PAIRS_NEEDS, files_of, made_paths, roles, unread
from bessemer.posttraining.preference.config import PREFERENCE_VERSION, PreferenceConfig
from bessemer.posttraining.sft.report import metric_curves
from bessemer.training.report import diagnostics, task_accuracies, training_curves
from bessemer.training.specs import model_not_merged, resolved_by, training_arguments, training_stage

#: Title of a chart → the metrics that are its curves, with the factor of their values.
_CHARTS = {
    "Told apart by implicit reward, %": (("accuracy",), 100.0),
    "Implicit reward, β times the log-ratio to the reference, in nats": (
        ("reward_chosen", "reward_rejected", "reward_desirable", "reward_undesirable"),
        1.0,
    ),
    "How far the policy has moved, z of KTO, in nats per answer": (("kl",), 1.0),
    "Log-ratio of what is to be forgotten, nats per text": (("log_ratio_forget",), 1.0),
    "Log-probability of the answers, nats per token": (
        ("log_prob_chosen", "log_prob_rejected", "log_prob_forget", "log_prob_retain"),
        1.0,
    ),
}


_LEARNS = (
    "The model learns which of two answers people prefer. Its implicit reward of an answer is how much likelier it has "
    "become than under the reference, the model as it was before. The log-probabilities of both answers may fall: "
    "what is learnt is their difference."
)
_FORGETS = (
    "The model unlearns texts: they become less likely than under the reference, the model as it was before, and less is done "
    "about each the less likely it already is. Other texts are learnt beside them, so that they are kept. Whether what was "
    "unlearnt can still be extracted, also from rounded weights, is for the stage memorisation to say."
)


def report(stage: StageReport) -> Section:
    """Accuracy and rewards of the pairs, training and held out, and the curves that all methods have."""
    forgets = "forgotten" in stage.metrics
    parts: list[Part] = [
        Text(_FORGETS if forgets else _LEARNS, lead=True),
        *metric_curves(stage.records, _CHARTS),
        *training_curves(stage.records, loss="Loss of a pair, or an answer"),
        *task_accuracies(stage.records),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Unlearning" if forgets else "Preferences"), parts)


def summary_line(metrics: Metrics) -> str:
    """Pairs or answers, and the share of held-out ones that the model ranks correctly."""
    if "forgotten" in metrics:
        return f"{metrics['forgotten']:,} texts to forget, {metrics['kept']:,} to keep"
    name = next((name for name in ("pairs", "answers") if name in metrics), None)
    if name is None:
        return ""
    accuracy = metrics.get("validation_accuracy")
    held_out = "" if accuracy is None else f", {accuracy:.0%} of {metrics['held_out']:,} held out ranked correctly"
    return f"{metrics[name]:,} {name}{held_out}"


def _preference(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.preference.stage import preference

    return preference(
        context.config,
        context.inputs["model"],
        context.out,
        made=made_paths(context.inputs),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


def pairs_fingerprint(config: Any, outside: Outside) -> dict[str, str]:
    """Hashes of the files that the settings name under `data`, for a stage's key."""
    from bessemer.posttraining.data.examples import files_fingerprint

    return files_fingerprint(files_of(config.data), outside.folder)


STAGES = (
    training_stage(
        kind="preference",
        summary="Train the model on pairs of a preferred and a rejected answer (DPO and its kin).",
        config=PreferenceConfig,
        version=PREFERENCE_VERSION,
        needs={**PAIRS_NEEDS, **roles([FORGETTING])},
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="preference: {data: [pairs.jsonl]}",
        budget_seconds=18,
        report=report,
        summary_line=summary_line,
        run=_preference,
        resolve=resolved_by(_preference),
        unread=unread([*MADE_PAIRS, FORGETTING]),
        fingerprint=pairs_fingerprint,
    ),
)
