"""The stage `rl`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.rewards.config import RewardModelReward
from bessemer.posttraining.rl import report
from bessemer.posttraining.rl.config import RL_VERSION, RLConfig
from bessemer.training.specs import check_loop, loop_packages, model_not_merged, resolved_by, training_arguments, training_stage


def _rl(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.rl.stage import rl

    return rl(
        context.config,
        context.inputs["model"],
        context.out,
        tasks=context.services.tasks,
        reward_model=context.inputs.get("reward_model"),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


def _fingerprint(config: RLConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint
    from bessemer.posttraining.rewards.fingerprint import rewards_fingerprint

    files = files_fingerprint([name for name in config.data if "." in name], outside.folder)
    models = rewards_fingerprint(config.rewards, outside.folder)
    # only where there are any, so that the keys of other runs stay
    return [files, models] if models else files


def _check(config: RLConfig) -> None:
    """Raises ConfigError for a name of no registry, besides what all stages that train need."""
    from bessemer.posttraining.preference.registry import PAIR_LOSSES
    from bessemer.posttraining.rl.registries import ADVANTAGES, AGGREGATIONS, CORRECTIONS, DIVERGENCES, POLICY_LOSSES

    check_loop(config)
    ADVANTAGES.find(config.advantage)
    POLICY_LOSSES.find(config.loss)
    AGGREGATIONS.find(config.aggregation)
    CORRECTIONS.find(config.correction)
    DIVERGENCES.find(config.divergence)
    if config.pair_loss is not None:
        PAIR_LOSSES.find(config.pair_loss)


def _packages(config: RLConfig) -> list[str]:
    needed = ["jsonschema"] if any(reward.reward == "json_schema" for reward in config.rewards) else []
    return [*loop_packages(config), *needed]


def _unread(config: RLConfig) -> frozenset[str]:
    starts = config.critic is not None and config.critic.start == "reward_model"
    judges = any(isinstance(reward, RewardModelReward) and reward.model is None for reward in config.rewards)
    return frozenset() if starts or judges else frozenset({"reward_model"})


STAGES = (
    training_stage(
        kind="rl",
        summary="Train the model by rewards of what it writes (GRPO, PPO and their kin).",
        config=RLConfig,
        version=RL_VERSION,
        needs={"model": "model", "reward_model": "reward_model"},
        unread=_unread,
        makes={"model": "model", "completions": "completions.jsonl"},
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="rl: {data: [prompts.jsonl], rewards: [answer]}",
        budget_seconds=55,
        report=report.report,
        summary_line=report.summary_line,
        run=_rl,
        resolve=resolved_by(_rl),
        fingerprint=_fingerprint,
        packages=_packages,
        check=_check,
    ),
)
