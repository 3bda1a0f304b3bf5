"""The stage `preference`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import StageContext
from bessemer.posttraining.made import PAIRS_NEEDS, made_paths, pairs_fingerprint, unread_pairs
from bessemer.posttraining.preference import report
from bessemer.posttraining.preference.config import PREFERENCE_VERSION, PreferenceConfig
from bessemer.training.specs import model_not_merged, resolved_by, training_arguments, training_stage


def _preference(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.preference.stage import preference

    return preference(
        context.config,
        context.inputs["model"],
        context.out,
        tasks=context.services.tasks,
        made=made_paths(context.inputs),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


STAGES = (
    training_stage(
        kind="preference",
        summary="Train the model on pairs of a preferred and a rejected answer (DPO and its kin).",
        config=PreferenceConfig,
        version=PREFERENCE_VERSION,
        needs=dict(PAIRS_NEEDS),
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="preference: {data: [pairs.jsonl]}",
        budget_seconds=18,
        report=report.report,
        summary_line=report.summary_line,
        run=_preference,
        resolve=resolved_by(_preference),
        unread=unread_pairs,
        fingerprint=pairs_fingerprint,
    ),
)
