"""The stage `reward`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import StageContext
from bessemer.posttraining.made import PAIRS_NEEDS, made_paths, pairs_fingerprint, unread_pairs
from bessemer.posttraining.reward import report
from bessemer.posttraining.reward.config import REWARD_VERSION, RewardConfig
from bessemer.training.specs import resolved_by, training_arguments, training_stage


def _reward(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.reward.stage import reward

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
        report=report.report,
        summary_line=report.summary_line,
        run=_reward,
        resolve=resolved_by(_reward),
        unread=unread_pairs,
        fingerprint=pairs_fingerprint,
    ),
)
