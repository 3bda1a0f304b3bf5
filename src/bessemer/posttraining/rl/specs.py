"""The stage `rl`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.rl import report
from bessemer.posttraining.rl.config import RL_VERSION, RLConfig
from bessemer.training.specs import check_loop, loop_packages, training_arguments, training_stage


def _rl(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.rl.stage import rl

    return rl(
        context.config,
        context.inputs["model"],
        context.out,
        tasks=context.services.tasks,
        **training_arguments(context),
    )


def _fingerprint(config: RLConfig, outside: Outside) -> Any:
    from bessemer.posttraining.dataset import files_fingerprint

    files = [name for name in config.data if "." in name]
    return files_fingerprint(files, outside.folder)


def _check(config: RLConfig) -> None:
    """Raises ConfigError for a name of no registry, besides what all stages that train need."""
    from bessemer.posttraining.rl.advantages import ADVANTAGES
    from bessemer.posttraining.rl.objective import PolicyObjective

    check_loop(config)
    ADVANTAGES.find(config.advantage)
    PolicyObjective.of(config)


def _packages(config: RLConfig) -> list[str]:
    needed = ["jsonschema"] if any(reward.reward == "json_schema" for reward in config.rewards) else []
    return [*loop_packages(config), *needed]


STAGES = (
    training_stage(
        kind="rl",
        summary="Train the model by rewards of what it writes (GRPO and its kin).",
        config=RLConfig,
        version=RL_VERSION,
        makes={"model": "model", "completions": "completions.jsonl"},
        example="rl: {data: [prompts.jsonl], rewards: [answer]}",
        budget_seconds=55,
        report=report.report,
        summary_line=report.summary_line,
        run=_rl,
        fingerprint=_fingerprint,
        packages=_packages,
        check=_check,
    ),
)
