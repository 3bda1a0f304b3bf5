"""The stage `pretrain`, and what all stages that train have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.config import Config, nearest
from bessemer.core.hashing import hash_file
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.data.config import CollectConfig, MixedConfig
from bessemer.data.sources.registry import source_name
from bessemer.model.config import ModelStageConfig
from bessemer.model.specs import MODEL_PACKAGES
from bessemer.tokenization.config import TokenizeConfig
from bessemer.training import report
from bessemer.training.config import LoopConfig, check_compiler
from bessemer.training.pretrain_config import PRETRAIN_VERSION, PretrainConfig

if TYPE_CHECKING:
    from bessemer.training.job import RunOptions


def rows_too_long(config: LoopConfig, above: Mapping[str, Any]) -> str | None:
    """Rows that are longer than the model's context, said before the stages above are made; None when they fit."""
    model = last_of(above, ModelStageConfig)
    if model is None:
        return None
    if model.init_from is not None and "max_position_embeddings" not in model.given:
        # the limit is the existing model's
        return None
    return _longer_rows(config, model.max_position_embeddings)


def rows_too_long_for_existing(config: LoopConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """As `rows_too_long`, for the context of an existing model's folder."""
    model = last_of(above, ModelStageConfig)
    if model is None or model.init_from is None:
        return None
    from bessemer.model.stage import changed_config, existing_model
    from bessemer.model.storage.model_config import read_model_config

    existing = read_model_config(existing_model(model.init_from, folder))
    return _longer_rows(config, changed_config(model, existing).max_position_embeddings)


def _longer_rows(config: LoopConfig, limit: int) -> str | None:
    if config.context_length <= limit:
        return None
    return (
        f"context_length {config.context_length:,} exceeds model.max_position_embeddings {limit:,}; lower the one or raise the "
        "other"
    )


def check_loop(config: LoopConfig) -> None:
    """Raises ConfigError when a tracker or a compiler that the settings ask for is missing."""
    from bessemer.training.monitoring.trackers import check_trackers

    check_trackers(config.track)
    if config.compile is True:
        check_compiler()


def model_not_merged(config: LoopConfig) -> dict[str, str]:
    """Why a stage that trains an adapter alone makes no model."""
    if config.low_rank is None or config.low_rank.merge:
        return {}
    return {"model": "it writes an adapter alone; set adapter.merge: true there"}


def loop_packages(config: LoopConfig) -> list[str]:
    """Modules that a training stage imports under its settings."""
    return [*MODEL_PACKAGES, *(["torchao"] if config.float8 or config.optimizer_bits == 8 else [])]


def training_arguments(context: StageContext) -> RunOptions:
    """The options that all training stages take of a run."""
    return {
        "seed": context.seed,
        "device": context.device,
        "progress": context.progress,
        "folder": context.folder,
        "card_flops": context.services.card_flops,
        "tasks": context.services.tasks,
    }


def resolved_by(run: Callable[..., dict[str, Any]]) -> Callable[[StageContext], tuple[Config, dict[str, Any]]]:
    """`StageSpec.resolve` of a stage whose `run` takes `only_resolve`: it gathers its data, as in its run, and
    measures steps of it."""

    def resolve(context: StageContext) -> tuple[Config, dict[str, Any]]:
        from bessemer.training.autotune import SettingsResolvedError

        try:
            run(context, only_resolve=True)
        except SettingsResolvedError as resolved:
            return resolved.config, resolved.measured
        raise AssertionError(f"{context.config} has nothing to be resolved")

    return resolve


def training_stage(**described: Any) -> StageSpec:
    """A stage that trains a model; `described`: as in `StageSpec`, in place of what such stages have alike. Its texts say where
    the model before the stage is kept."""
    alike: dict[str, Any] = {
        "needs": {"model": "model"},
        "makes": {"model": "model"},
        "links": {"model": "model"},
        "remedy": "retrain",
        "uses_seed": True,
        "resumes": True,
        "trains": True,
        "conflict": rows_too_long,
        "conflict_of_files": rows_too_long_for_existing,
        "packages": loop_packages,
        "check": check_loop,
    }
    spec = StageSpec(**alike | described)
    return dataclasses.replace(
        spec,
        report=report.with_comparison(spec.report),
        summary_line=report.with_kept(spec.summary_line),
        sentences=report.with_warning(spec.sentences),
        fingerprint=_with_compared_tasks(spec.fingerprint),
    )


def _with_compared_tasks(fingerprint: Callable[[Any, Outside], Any]) -> Callable[[Any, Outside], Any]:
    """A stage's fingerprint and, only where there are any, so that the keys of other runs stay, the files of the tasks by which
    its models are compared."""

    def extended(config: LoopConfig, outside: Outside) -> Any:
        own = fingerprint(config, outside)
        tasks = [] if config.comparison is None else config.comparison.tasks
        files = [outside.folder / name for name in tasks if name.endswith((".yaml", ".yml"))]
        return [own, [hash_file(path) for path in files if path.is_file()]] if files else own

    return extended


def _pretrain_conflict(config: PretrainConfig, above: Mapping[str, Any]) -> str | None:
    tokenize = last_of(above, TokenizeConfig)
    collect = last_of(above, CollectConfig)
    if tokenize is not None and config.fim_rate and not (tokenize.fim_tokens or tokenize.tokenizer):
        return "fim_rate needs control tokens that the tokenizer will lack: set tokenize.fim_tokens"
    if collect is not None:
        names = [source_name(source) for source in collect.sources]
        unknown = next((name for name in config.fim_sources if name not in names), None)
        if unknown is not None:
            return f"fim_sources: no source is named {unknown!r}{nearest(unknown, names)}"
    annealed = next((name for name, stage in above.items() if isinstance(stage, MixedConfig) and stage.anneal), None)
    if annealed and config.anneal_fraction is None and config.schedule != "wsd":
        return (
            f"anneal_fraction: {annealed}.anneal is a second mixture, and schedule: {config.schedule} has no decay to read it "
            "in; say for which share of the steps it is, or 0"
        )
    return rows_too_long(config, above)


def _resolve_pretrain(context: StageContext) -> tuple[Config, dict[str, Any]]:
    from bessemer.training.autotune import resolve

    return resolve(
        context.config, context.inputs["model"], device=context.device, progress=context.progress, folder=context.folder
    )


def _pretrain(context: StageContext) -> dict[str, Any]:
    from bessemer.training.pretrain import pretrain

    return pretrain(
        context.config,
        context.inputs["model"],
        context.inputs["tokens"],
        context.out,
        sample=context.services.continuations,
        measured_tokens_per_second=(context.measured or {}).get("tokens_per_second"),
        **training_arguments(context),
    )


def _pretrain_fingerprint(config: PretrainConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.training.checkpoint.export import checkpoint_fingerprint

    return checkpoint_fingerprint(config.init_from, outside.folder, config.steps)


STAGES = (
    training_stage(
        kind="pretrain",
        summary="Pretrain the model on token shards, or go on with a trained one (mid-training).",
        config=PretrainConfig,
        version=PRETRAIN_VERSION,
        needs={"model": "model", "tokens": "tokens"},
        example="pretrain: {minutes: 4}",
        budget_seconds=180,
        report=report.report,
        summary_line=report.summary_line,
        sentences=report.sentences,
        next_steps=report.next_steps,
        run=_pretrain,
        resolve=_resolve_pretrain,
        fingerprint=_pretrain_fingerprint,
        conflict=_pretrain_conflict,
    ),
)
