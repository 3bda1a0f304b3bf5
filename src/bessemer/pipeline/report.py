"""Gathers what a run left in its folder into one report. Drawing is the views' work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bessemer.core.metrics import read_metrics
from bessemer.core.progress import size
from bessemer.core.store import MANIFEST, read_json, write_text
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.stages import DATA_STAGES
from bessemer.pipeline.summary import next_steps, sentences
from bessemer.pipeline.yaml_file import dump_yaml
from bessemer.views.figures import baseline_label, short_count
from bessemer.views.run_data import Answer, KeyFigure, Metrics, ReportData, StageRun, Training


def write_report(run: RunFolder) -> Path:
    """Write `report.html` in the run's folder from its stages' manifests and files; returns its path."""
    from bessemer.views.report import render_report

    path = run.folder / "report.html"
    write_text(path, render_report(gather(run)))
    return path


def gather(run: RunFolder) -> ReportData:
    """Everything that the report shows of a run. Stages that are not there yet are left out."""
    record, folders = run.record(), run.stages()
    manifests = {stage: read_json(folder / MANIFEST, "manifest") for stage, folder in folders.items()}
    metrics = {stage: manifest["metrics"] for stage, manifest in manifests.items()}
    results = metrics.get("evaluate")
    answers = _answers(folders["evaluate"] / "answers.jsonl") if "evaluate" in folders else []
    newest: dict[str, Any] = max(manifests.values(), key=lambda manifest: manifest["created"], default={})
    lock = run.folder / "recipe.lock.yaml"
    return ReportData(
        name=run.name,
        description=record["recipe"].get("description", ""),
        sentences=sentences(metrics),
        figures=_figures(metrics),
        next_steps=next_steps(run.name, run.folder, metrics),
        stages=[
            StageRun(
                name=stage,
                seconds=manifest["seconds"],
                peak_memory_bytes=manifest["peak_memory_bytes"],
                summary=_in_few_words(stage, metrics[stage]),
                key=manifest["key"],
            )
            for stage, manifest in manifests.items()
        ],
        data={stage: metrics[stage] for stage in metrics if stage in DATA_STAGES},
        tokenizer=metrics.get("tokenize"),
        model=metrics.get("model"),
        pretraining=_training("pretrain", folders, metrics, results, []),
        finetuning=_training("sft", folders, metrics, None, answers),
        evaluation=results,
        quantisation=_quality(folders["quantize"]) if "quantize" in folders else None,
        versions=newest.get("versions", {}),
        host=newest.get("host", {}),
        commit=newest.get("commit"),
        made=newest.get("created", ""),
        recipe=dump_yaml(record["recipe"]),
        lock=lock.read_text(encoding="utf-8") if lock.exists() else "",
    )


def _quality(folder: Path) -> Metrics | None:
    """What the quantised model's own file says, to which speed and cost may have been added since the stage ran."""
    found: Metrics = read_json(folder / "model" / "quality.json", "report of a quantised model's quality")
    return found


def _training(
    stage: str, folders: dict[str, Path], metrics: dict[str, Any], results: Metrics | None, answers: list[Answer]
) -> Training | None:
    if stage not in folders:
        return None
    return Training(
        metrics=metrics[stage],
        records=read_metrics(folders[stage] / "metrics.jsonl"),
        samples=read_metrics(folders[stage] / "samples.jsonl"),
        baselines={baseline_label(name): value for name, value in (results or {}).get("baselines", {}).items()},
        answers=[answer for answer in answers if answer.model == stage],
    )


def _answers(path: Path) -> list[Answer]:
    """The models' answers to the tasks' questions, from `answers.jsonl`."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Answer(
            question=record["messages"][-1]["content"],
            expected=record["reference"],
            answer=given["text"],
            correct=bool(given["exact_match"]),
            held_in=record["set"] == "held_in",
            model=model,
        )
        for record in records
        for model, given in record["answers"].items()
    ]


def _figures(metrics: dict[str, Any]) -> list[KeyFigure]:
    figures = []
    data = [found for stage, found in metrics.items() if stage in DATA_STAGES]
    if data:
        figures.append(
            KeyFigure(
                value=size(data[-1]["bytes_out"]), label="of clean text", note=f"of {size(data[0]['bytes_out'])} collected"
            )
        )
    if "model" in metrics:
        figures.append(KeyFigure(value=short_count(metrics["model"]["parameters"]), label="parameters"))
    results = metrics.get("evaluate", {})
    scores, baselines = results.get("bits_per_byte", {}), results.get("baselines", {})
    if scores:
        best = min(scores.values())
        five = baselines.get("witten_bell_5gram")
        figures.append(
            KeyFigure(value=f"{best:.3f}", label="bits per byte, held out", note=f"byte 5-gram {five:.3f}" if five else "")
        )
    for by_model in results.get("tasks", {}).values():
        last = list(by_model.values())[-1] if by_model else {}
        if "exact_match_held_in" in last:
            figures.append(
                KeyFigure(value=f"{last['exact_match_held_in']:.0%}", label="of its own questions", note="memorised")
            )
    return figures


def _in_few_words(stage: str, metrics: Metrics) -> str:
    """What a stage made, for the table of stages."""
    if stage in DATA_STAGES:
        dropped = metrics["documents_in"] - metrics["documents_out"]
        return f"{metrics['documents_out']:,} documents" + (f", {dropped:,} dropped" if dropped else "")
    if stage == "tokenize":
        return f"{metrics['vocab_size']:,} tokens, {metrics['train']['bytes_per_token']:.2f} bytes each"
    if stage == "model":
        return f"{metrics['parameters']:,} parameters"
    if "steps" in metrics:
        return f"{metrics['steps']:,} steps"
    if stage == "quantize":
        return f"{metrics['scheme']}, {size(metrics['quantised']['bytes'])} of weights"
    return f"{len(metrics['bits_per_byte'])} models measured" if "bits_per_byte" in metrics else ""
