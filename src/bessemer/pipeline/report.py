"""Gathers what a run's stages report into one report. Each stage's own package says what; `views` draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.figures import label
from bessemer.core.metrics import read_metrics
from bessemer.core.report import Facts, KeyFigure, Metrics, ReportFunction, RunReport, Section, StageReport
from bessemer.core.store import MANIFEST, read_json, write_text
from bessemer.data.reports import section as corpus
from bessemer.evaluation import report as evaluation
from bessemer.model import report as model
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.yaml_file import dump_yaml
from bessemer.posttraining import report as posttraining
from bessemer.tokenization import report as tokenization
from bessemer.training import report as training
from bessemer.views.run_data import ReportData, StageRun


def _facts(stage: StageReport) -> Section:
    """The section of a stage that has none of its own: its figures."""
    return Section(label(stage.name), [Facts(stage.metrics)])


@dataclass(frozen=True)
class StageFunctions:
    """What a kind of stage says of its work: a section of the report, a line for the table of stages, sentences, key figures
    and commands that go on from it."""

    report: ReportFunction = _facts
    summary_line: Callable[[Metrics], str] = lambda metrics: ""
    sentences: Callable[[StageReport], list[str]] = lambda stage: []
    key_figures: Callable[[StageReport], list[KeyFigure]] = lambda stage: []
    next_steps: Callable[[StageReport], list[str]] = lambda stage: []


_CORPUS = StageFunctions(
    report=corpus.report,
    summary_line=corpus.summary_line,
    sentences=corpus.sentences,
    key_figures=corpus.key_figures,
)

#: The functions of each kind of stage.
_FUNCTIONS: dict[str, StageFunctions] = {
    "collect": _CORPUS,
    "clean": _CORPUS,
    "select": _CORPUS,
    "deduplicate": _CORPUS,
    "tokenize": StageFunctions(report=tokenization.report, summary_line=tokenization.summary_line),
    "model": StageFunctions(
        report=model.report,
        summary_line=model.summary_line,
        sentences=model.sentences,
        key_figures=model.key_figures,
        next_steps=model.next_steps,
    ),
    "pretrain": StageFunctions(report=training.report, summary_line=training.summary_line, next_steps=training.next_steps),
    "sft": StageFunctions(
        report=posttraining.report, summary_line=posttraining.summary_line, next_steps=posttraining.next_steps
    ),
    "evaluate": StageFunctions(
        report=evaluation.report,
        summary_line=evaluation.summary_line,
        sentences=evaluation.sentences,
        key_figures=evaluation.key_figures,
    ),
    "quantize": StageFunctions(report=evaluation.quantisation_report, summary_line=evaluation.quantisation_summary_line),
}


def _functions(kind: str) -> StageFunctions:
    return _FUNCTIONS.get(kind, StageFunctions())


def write_report(run: RunFolder) -> Path:
    """Write `report.html` in the run's folder from its stages' manifests and files; returns its path."""
    from bessemer.views.report import render_report

    path = run.folder / "report.html"
    write_text(path, render_report(gather(run)))
    return path


def gather(run: RunFolder) -> ReportData:
    """Everything that the report shows of a run. Stages that are not there yet are left out."""
    record, manifests = run.record(), _manifests(run)
    stages = _run_report(run, manifests)
    newest: Mapping[str, Any] = max(manifests.values(), key=lambda manifest: manifest["created"], default={})
    lock = run.folder / "recipe.lock.yaml"
    return ReportData(
        name=run.name,
        description=record["recipe"].get("description", ""),
        sentences=sentences(stages),
        figures=[figure for stage in stages.stages for figure in _functions(stage.kind).key_figures(stage)],
        next_steps=next_steps(stages),
        stages=[
            StageRun(
                name=stage.name,
                seconds=manifests[stage.name]["seconds"],
                peak_memory_bytes=manifests[stage.name]["peak_memory_bytes"],
                summary=_functions(stage.kind).summary_line(stage.metrics),
                key=manifests[stage.name]["key"],
            )
            for stage in stages.stages
        ],
        sections=sections(stages),
        versions=newest.get("versions", {}),
        host=newest.get("host", {}),
        commit=newest.get("commit"),
        made=newest.get("created", ""),
        recipe=dump_yaml(record["recipe"]),
        lock=lock.read_text(encoding="utf-8") if lock.exists() else "",
    )


def _manifests(run: RunFolder) -> dict[str, Metrics]:
    return {stage: read_json(folder / MANIFEST, "manifest") for stage, folder in run.stages().items()}


def run_report(run: RunFolder) -> RunReport:
    """The finished stages of a run, each with what its report functions are given."""
    return _run_report(run, _manifests(run))


def _run_report(run: RunFolder, manifests: Mapping[str, Metrics]) -> RunReport:
    stages: list[StageReport] = []
    found = RunReport(name=run.name, folder=run.folder, stages=stages)
    stages += [
        StageReport(
            name=name,
            kind=manifests[name]["stage"],
            metrics=manifests[name]["metrics"],
            folder=folder,
            records=read_metrics(folder / "metrics.jsonl"),
            run=found,
        )
        for name, folder in run.stages().items()
    ]
    return found


def sections(run: RunReport) -> list[Section]:
    """The stages' sections, in order."""
    found: Iterable[Section | None] = (_functions(stage.kind).report(stage) for stage in run.stages)
    return [section for section in found if section is not None]


def sentences(run: RunReport) -> list[str]:
    """A finished run in a few sentences."""
    return [sentence for stage in run.stages for sentence in _functions(stage.kind).sentences(stage)]


def next_steps(run: RunReport) -> list[str]:
    """Commands that go on from a finished run, those of its last stages first."""
    commands = [command for stage in reversed(run.stages) for command in _functions(stage.kind).next_steps(stage)]
    return [*dict.fromkeys(commands), f"bessemer show {run.name}"]
