"""The stage `preference`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.preference import report
from bessemer.posttraining.preference.config import PREFERENCE_VERSION, PreferenceConfig
from bessemer.training.specs import model_not_merged, training_arguments, training_stage


def _preference(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.preference.stage import preference

    return preference(
        context.config,
        context.inputs["model"],
        context.out,
        tasks=context.services.tasks,
        **training_arguments(context),
    )


def _fingerprint(config: PreferenceConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint

    return files_fingerprint(config.data, outside.folder)


STAGES = (
    training_stage(
        kind="preference",
        summary="Train the model on pairs of a preferred and a rejected answer (DPO and its kin).",
        config=PreferenceConfig,
        version=PREFERENCE_VERSION,
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="preference: {data: [pairs.jsonl]}",
        budget_seconds=18,
        report=report.report,
        summary_line=report.summary_line,
        run=_preference,
        fingerprint=_fingerprint,
    ),
)
