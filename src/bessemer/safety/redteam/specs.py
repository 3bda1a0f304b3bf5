"""The stage `redteam`: attacks on the model of a recipe, and what its answers show."""

from __future__ import annotations

from typing import Any

from bessemer.core.config import Config
from bessemer.core.hashing import hash_file
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.model.specs import model_packages
from bessemer.safety.redteam import report
from bessemer.safety.redteam.config import REDTEAM_VERSION, RedTeamConfig
from bessemer.safety.redteam.goals import default_seeds_path
from bessemer.tasks.judged import chat_models_fingerprint


def _redteam(context: StageContext) -> dict[str, Any]:
    from bessemer.safety.redteam.run import redteam_stage

    return redteam_stage(context)


def _resolve(context: StageContext) -> tuple[Config, dict[str, Any]]:
    from bessemer.safety.redteam.run import within_minutes

    return within_minutes(context)


def _fingerprint(config: RedTeamConfig, outside: Outside) -> Any:
    """The policy, the goals, and an attacker or a judge on this machine. Reading them reports their mistakes beforehand."""
    from bessemer.safety.redteam.run import goals_for, policy_and_seeds

    goals_for(config, outside.folder)
    files = [hash_file(path) for path in (default_seeds_path(), *policy_and_seeds(config, outside.folder))]
    return [files, chat_models_fingerprint([config.attacker, config.judge], outside.folder)]


STAGES = (
    StageSpec(
        kind="redteam",
        summary="Attack the model: how often which attack succeeds, and how many harmless requests it refuses.",
        config=RedTeamConfig,
        version=REDTEAM_VERSION,
        needs={"model": "model"},
        makes={"redteam": "."},
        remedy="measure again",
        budget_seconds=20,
        report=report.report,
        summary_line=report.summary_line,
        sentences=report.sentences,
        key_figures=report.key_figures,
        run=_redteam,
        resolve=_resolve,
        fingerprint=_fingerprint,
        uses_seed=True,
        resumes=True,
        packages=model_packages,
    ),
)
