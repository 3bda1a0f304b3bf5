"""The stage `preference`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.posttraining.preference import report
from bessemer.posttraining.preference.config import PREFERENCE_VERSION, PreferenceConfig
from bessemer.training.specs import check_loop, loop_packages, model_not_merged, rows_too_long, rows_too_long_for_existing


def _preference(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.preference.stage import preference

    return preference(
        context.config,
        context.inputs["model"],
        context.out,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.folder,
        card_flops=context.services.card_flops,
        tasks=context.services.tasks,
    )


def _fingerprint(config: PreferenceConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint

    return files_fingerprint(config.data, outside.folder)


STAGES = (
    StageSpec(
        kind="preference",
        summary="Train the model on pairs of a preferred and a rejected answer (DPO and its kin).",
        config=PreferenceConfig,
        version=PREFERENCE_VERSION,
        needs={"model": "model"},
        makes={"model": "model"},
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="preference: {data: [pairs.jsonl]}",
        remedy="retrain",
        budget_seconds=18,
        report=report.report,
        summary_line=report.summary_line,
        run=_preference,
        uses_seed=True,
        resumes=True,
        trains=True,
        fingerprint=_fingerprint,
        conflict=rows_too_long,
        conflict_of_files=rows_too_long_for_existing,
        packages=loop_packages,
        check=check_loop,
    ),
)
