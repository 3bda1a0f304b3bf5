"""The stage `reward`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.posttraining.reward import report
from bessemer.posttraining.reward.config import REWARD_VERSION, RewardConfig
from bessemer.training.specs import check_loop, loop_packages, rows_too_long, rows_too_long_for_existing


def _reward(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.reward.stage import reward

    return reward(
        context.config,
        context.inputs["model"],
        context.out,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.folder,
        card_flops=context.services.card_flops,
    )


def _fingerprint(config: RewardConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint

    return files_fingerprint(config.data, outside.folder)


STAGES = (
    StageSpec(
        kind="reward",
        summary="Train a reward model on pairs of a preferred and a rejected answer.",
        config=RewardConfig,
        version=REWARD_VERSION,
        needs={"model": "model"},
        makes={"reward_model": "model"},
        links={"reward_model": "model"},
        example="reward: {data: [pairs.jsonl]}",
        remedy="retrain",
        budget_seconds=12,
        report=report.report,
        summary_line=report.summary_line,
        run=_reward,
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
