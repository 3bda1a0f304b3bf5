"""The stage `embedder` for the pipeline, and its section of the report."""

from __future__ import annotations

from typing import Any

from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.data.made import QUESTIONS, files_of, made_paths, roles, unread
from bessemer.posttraining.embedding.config import EMBEDDER_VERSION, EmbedderConfig
from bessemer.posttraining.sft.report import metric_curves
from bessemer.training.report import diagnostics, training_curves
from bessemer.training.specs import resolved_by, training_arguments, training_stage

_MADE = (QUESTIONS,)
#: Title of a chart → the metrics that are its curves, with the factor of their values.
_CHARTS = {"Questions whose passage is the nearest of their row, %": (("accuracy",), 100.0)}


def report(stage: StageReport) -> Section:
    """Curves of the training."""
    parts: list[Part] = [
        Text(
            "The model learns to give a question and the passage that answers it near vectors, and other passages far ones. "
            "How well passages are found shows in a search on questions that people ask: those made of passages are easier.",
            lead=True,
        ),
        *metric_curves(stage.records, _CHARTS),
        *training_curves(stage.records, loss="Loss of a question"),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Embedder"), parts)


def summary_line(metrics: Metrics) -> str:
    """The number of questions."""
    return f"{metrics['questions']:,} questions in {metrics['rows']:,} rows" if "questions" in metrics else ""


def next_steps(stage: StageReport) -> list[str]:
    """Indexing documents with it."""
    return [f"bessemer index DOCS OUT --embedder {stage.run.folder / 'embedder'}"]


def _embedder(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.embedding.stage import embedder

    return embedder(
        context.config,
        context.inputs["model"],
        context.out,
        made=made_paths(context.inputs),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


def _fingerprint(config: EmbedderConfig, outside: Outside) -> Any:
    from bessemer.posttraining.data.examples import files_fingerprint

    return files_fingerprint(files_of(config.data), outside.folder)


STAGES = (
    training_stage(
        kind="embedder",
        summary="Train a model to give texts vectors by which passages are found (contrastive learning).",
        config=EmbedderConfig,
        version=EMBEDDER_VERSION,
        needs={"model": "model", **roles(_MADE)},
        unread=unread(_MADE),
        makes={"embedder": "model"},
        links={"embedder": "model"},
        example="embedder: {data: [questions.jsonl]}",
        report=report,
        summary_line=summary_line,
        next_steps=next_steps,
        run=_embedder,
        resolve=resolved_by(_embedder),
        fingerprint=_fingerprint,
    ),
)
