"""The stage `rl`."""

from __future__ import annotations

from typing import Any

from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.posttraining.rl import report
from bessemer.posttraining.rl.config import RL_VERSION, RLConfig
from bessemer.training.specs import check_loop, loop_packages, rows_too_long, rows_too_long_for_existing


def _rl(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.rl.stage import rl

    return rl(
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
    StageSpec(
        kind="rl",
        summary="Train the model by rewards of what it writes (GRPO and its kin).",
        config=RLConfig,
        version=RL_VERSION,
        needs={"model": "model"},
        makes={"model": "model", "completions": "completions.jsonl"},
        links={"model": "model"},
        example="rl: {data: [prompts.jsonl], rewards: [answer]}",
        remedy="retrain",
        budget_seconds=55,
        report=report.report,
        summary_line=report.summary_line,
        run=_rl,
        uses_seed=True,
        resumes=True,
        trains=True,
        fingerprint=_fingerprint,
        conflict=rows_too_long,
        conflict_of_files=rows_too_long_for_existing,
        packages=_packages,
        check=_check,
    ),
)
