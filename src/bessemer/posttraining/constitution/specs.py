"""The stages `revise` and `ai_preferences`."""

from __future__ import annotations

from typing import Any

from bessemer.core.hashing import hash_file
from bessemer.core.policy import default_policy_path, read_policy
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.model.specs import model_packages
from bessemer.posttraining.constitution import report
from bessemer.posttraining.constitution.config import (
    AI_PREFERENCES_VERSION,
    REVISE_VERSION,
    AIPreferencesConfig,
    PrincipledConfig,
    ReviseConfig,
)


def _arguments(context: StageContext) -> dict[str, Any]:
    return {"seed": context.seed, "device": context.device, "progress": context.progress, "folder": context.folder}


def _revise(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.constitution.revise import revise

    return revise(context.config, context.inputs["model"], context.out, **_arguments(context))


def _ai_preferences(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.constitution.ai_preferences import ai_preferences

    return ai_preferences(context.config, context.inputs["model"], context.out, **_arguments(context))


def _fingerprint(config: PrincipledConfig, outside: Outside) -> Any:
    """The files of prompts, the policy and a critic on this machine. The policy is read here, so that a mistake in it is said
    before anything runs."""
    from bessemer.posttraining.chat_models.files import chat_models_fingerprint
    from bessemer.posttraining.dataset import files_fingerprint

    path = default_policy_path() if config.policy is None else outside.folder / config.policy
    read_policy(path).chosen_principles(config.principles)
    return [
        files_fingerprint(config.data, outside.folder),
        hash_file(path),
        chat_models_fingerprint([config.critic], outside.folder),
    ]


def _stage(**described: Any) -> StageSpec:
    return StageSpec(
        needs={"model": "model"},
        remedy="make again: its answers are of a model that was trained on the document",
        uses_seed=True,
        resumes=True,
        fingerprint=_fingerprint,
        packages=model_packages,
        **described,
    )


STAGES = (
    _stage(
        kind="revise",
        summary="Let a model answer prompts, and criticise and revise its answers by principles.",
        config=ReviseConfig,
        version=REVISE_VERSION,
        makes={"revisions": "revisions.jsonl"},
        example="revise: {data: [prompts.jsonl]}",
        report=report.revise_report,
        summary_line=report.revise_line,
        run=_revise,
    ),
    _stage(
        kind="ai_preferences",
        summary="Let a model say which of two answers fits a principle better, and how sure it is.",
        config=AIPreferencesConfig,
        version=AI_PREFERENCES_VERSION,
        makes={"preferences": "preferences.jsonl"},
        example="ai_preferences: {data: [prompts.jsonl]}",
        report=report.preferences_report,
        summary_line=report.preferences_line,
        run=_ai_preferences,
    ),
)
