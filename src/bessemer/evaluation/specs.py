"""The stages `evaluate` and `quantize`: both measure models, the second after it has made one smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.progress import Silent
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.core.store import MANIFEST, read_json
from bessemer.evaluation import report
from bessemer.evaluation.config import DOCS_QUESTIONS, EVALUATE_VERSION, EvaluateConfig
from bessemer.model.quantisation.config import QUANTIZE_VERSION, QuantizeConfig
from bessemer.model.specs import model_packages


def _evaluate(context: StageContext) -> dict[str, Any]:
    from bessemer.evaluation.stage import evaluate

    return evaluate(context)


def _resolve_evaluate(context: StageContext) -> tuple[Config, dict[str, Any]]:
    from bessemer.evaluation.stage import evaluate, models_of, within_minutes
    from bessemer.tokenization.shards import TokenShards

    def evaluate_some(config: EvaluateConfig, models: Mapping[str, Path], out: Path) -> object:
        inputs = {role: path for role, path in context.inputs.items() if not role.startswith("model:")}
        inputs |= {f"model:{name}": path for name, path in models.items()}
        return evaluate(replace(context, config=config, inputs=inputs, out=out, progress=Silent()))

    models = models_of(context)
    return within_minutes(
        context.config,
        models,
        evaluate_some,
        context.progress,
        held_out_tokens=max(1, TokenShards(context.inputs["tokens"] / "validation").tokens - 1),
        training_seconds=_training_seconds(models),
    )


def _training_seconds(models: Mapping[str, Path]) -> float | None:
    """Seconds of the stages that made the models, as their manifests say; None where one has none."""
    manifests = [folder.parent / MANIFEST for folder in models.values()]
    if not all(manifest.is_file() for manifest in manifests):
        return None
    return sum(float(read_json(manifest, "manifest")["seconds"]) for manifest in manifests)


def _evaluate_fingerprint(config: EvaluateConfig, outside: Outside) -> Any:
    """What the tasks ask whose questions lie in files of the user's; None without such."""
    from bessemer.tasks.config import TaskOptions
    from bessemer.tasks.questions import task_identity
    from bessemer.tasks.registry import find_tasks, placed_task

    data = None if config.tasks_folder is None else outside.folder / config.tasks_folder
    names = [name for name in config.tasks if name != DOCS_QUESTIONS and (data is not None or name.endswith((".yaml", ".yml")))]
    if not names:
        return None
    options = TaskOptions(data=data, limit=config.questions)
    tasks = find_tasks([placed_task(name, outside.folder) for name in names], options)
    return {task.name: task_identity(task, list(task.questions())) for task in tasks}


def _quantize(context: StageContext) -> dict[str, Any]:
    from bessemer.evaluation.quantisation import add_speed, quantise_folder, tokens_per_second
    from bessemer.tokenization.shards import TokenShards

    out = context.out / "model"
    quality = quantise_folder(
        context.config,
        context.inputs["model"],
        out,
        calibration=TokenShards(context.inputs["tokens"] / "train"),
        held_out=TokenShards(context.inputs["tokens"] / "validation"),
        seed=context.seed,
        device=context.device,
        progress=context.progress,
    )
    if not context.config.speed_tokens:
        return quality
    context.progress.say("  measuring how fast both models answer")
    models = {"original": context.inputs["model"], "quantised": out}
    return add_speed(
        out, {name: tokens_per_second(at, context.config.speed_tokens, context.device) for name, at in models.items()}
    )


STAGES = (
    StageSpec(
        kind="evaluate",
        summary="Measure the models: bits per byte beside baselines, and tasks with bootstrap intervals.",
        config=EvaluateConfig,
        version=EVALUATE_VERSION,
        needs={"tokens": "tokens", "documents": "documents", "conversations": "conversations?"},
        makes={"results": "."},
        remedy="measure again",
        budget_seconds=25,
        report=report.report,
        summary_line=report.summary_line,
        sentences=report.sentences,
        key_figures=report.key_figures,
        run=_evaluate,
        resolve=_resolve_evaluate,
        fingerprint=_evaluate_fingerprint,
        uses_seed=True,
        packages=model_packages,
        models_named=lambda config: list(config.models),
    ),
    StageSpec(
        kind="quantize",
        summary="Store the model's weights in fewer bits, and measure what that costs in quality.",
        config=QuantizeConfig,
        version=QUANTIZE_VERSION,
        needs={"model": "model", "tokens": "tokens"},
        makes={"quantised": "model"},
        links={"quantised": "model"},
        budget_seconds=8,
        report=report.quantisation_report,
        summary_line=report.quantisation_summary_line,
        run=_quantize,
        uses_seed=True,
        packages=model_packages,
    ),
)
