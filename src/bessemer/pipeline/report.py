"""The report of a run, and the comparison of two: sections, figures and settings that differ, as report data.

Each stage's own package says what its section shows; `views` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.metrics import duration, read_metrics
from bessemer.core.report import (
    Column,
    Heading,
    KeyFigure,
    Metrics,
    Part,
    ReportData,
    RunReport,
    Section,
    StageReport,
    StageRun,
    Table,
    Text,
)
from bessemer.core.stage import StageSpec
from bessemer.core.store import MANIFEST, read_json, write_text
from bessemer.core.yaml_file import dump_yaml, read_yaml
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.stages import STAGES

#: Stands for the kind of a stage whose package is no longer installed.
_UNKNOWN = StageSpec("unknown", "", Config, 0, {}, {}, run=lambda context: {})


def _spec(stage: StageReport) -> StageSpec:
    return STAGES.get(stage.kind, _UNKNOWN)


def write_report(run: RunFolder) -> Path:
    """Write `report.html` in the run's folder from its stages' manifests and files; returns its path."""
    from bessemer.views.report import render_report

    path = run.folder / "report.html"
    write_text(path, render_report(gather(run)))
    return path


def gather(run: RunFolder) -> ReportData:
    """The data of a run's report, of its finished stages."""
    record, manifests = run.record(), _manifests(run)
    stages = run_report(run, manifests)
    newest: Mapping[str, Any] = max(manifests.values(), key=lambda manifest: manifest["created"], default={})
    lock = run.folder / "recipe.lock.yaml"
    return ReportData(
        name=run.name,
        description=record["recipe"].get("description", ""),
        sentences=sentences(stages),
        figures=key_figures(stages),
        next_steps=next_steps(stages),
        stages=[
            StageRun(
                name=stage.name,
                seconds=manifests[stage.name]["seconds"],
                peak_memory_bytes=manifests[stage.name]["peak_memory_bytes"],
                summary=_spec(stage).summary_line(stage.metrics),
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


def run_report(run: RunFolder, manifests: Mapping[str, Metrics] | None = None) -> RunReport:
    """The finished stages of a run, each with what its report functions are given. manifests: by stage, if they are read."""
    manifests = _manifests(run) if manifests is None else manifests
    stages: list[StageReport] = []
    report = RunReport(name=run.name, folder=run.folder, stages=stages)
    stages += [
        StageReport(
            name=name,
            kind=manifests[name]["stage"],
            metrics=manifests[name]["metrics"],
            folder=folder,
            records=read_metrics(folder / "metrics.jsonl"),
            run=report,
        )
        for name, folder in run.stages().items()
    ]
    return report


def key_figures(run: RunReport) -> list[KeyFigure]:
    """The figures at the head of the report."""
    return [figure for stage in run.stages for figure in _spec(stage).key_figures(stage)]


def stage_section(run: RunReport, name: str) -> Section | None:
    """The section of one stage; None where it has none, or is not made yet."""
    stage_report = next((stage for stage in run.stages if stage.name == name), None)
    return None if stage_report is None else _spec(stage_report).report(stage_report)


def sections(run: RunReport) -> list[Section]:
    """The stages' sections, in order."""
    drawn = (_spec(stage).report(stage) for stage in run.stages)
    return [section for section in drawn if section is not None]


def sentences(run: RunReport) -> list[str]:
    """A finished run in a few sentences."""
    sentences_of_stages = [sentence for stage in run.stages for sentence in _spec(stage).sentences(stage)]
    lock = run.folder / "recipe.lock.yaml"
    resolved = read_yaml(lock).values.get("stages", {}) if lock.exists() else {}
    return [*sentences_of_stages, *_machine_sentence(run, resolved), *_cut_sentences(run, resolved)]


def _machine_sentence(run: RunReport, resolved: Mapping[str, Any]) -> list[str]:
    """The machine of the run, its training dtype and speed; empty where nothing was measured."""
    for stage in run.stages:
        measured = resolved.get(stage.name, {}).get("measured") or {}
        if "arithmetic" in measured and "tokens_per_second" in stage.metrics:
            host = read_json(stage.folder / MANIFEST, "manifest").get("host", {})
            return [
                f"This machine ({host.get('processor', 'unknown')}, {host.get('cores', '?')} cores, {measured['arithmetic']}) "
                f"trained in {stage.metrics.get('dtype')}: {stage.name} at {stage.metrics['tokens_per_second']:,} tokens/s."
            ]
    return []


def _cut_sentences(run: RunReport, resolved: Mapping[str, Any]) -> list[str]:
    """For each stage that its time limit cut: how much was done, and the minutes that all would take."""
    lines = []
    for name in (stage.name for stage in run.stages):
        measured = resolved.get(name, {}).get("measured") or {}
        minutes = measured.get("minutes")
        if "planned_steps" in measured and minutes:
            made, planned = measured["steps"], measured["planned_steps"]
            what, share = f"{made:,} of {planned:,} steps", made / planned
        elif measured.get("share", 1.0) < 1 and minutes:
            what, share = f"{measured['share']:.0%} of its tokens and questions", measured["share"]
        else:
            continue
        if "training_seconds" in measured:
            trained = duration(measured["training_seconds"])
            lines.append(f"{name}: {what}, in proportion to {trained} of training; {name}.minutes=null takes all.")
            continue
        lines.append(
            f"{name}: {what} fitted its {minutes:g} minutes on this machine; all take about {minutes / share:.1f} "
            f"({name}.minutes={math.ceil(10 * minutes / share) / 10:g})."
        )
    return lines


def next_steps(run: RunReport) -> list[str]:
    """Commands that go on from a finished run, those of its last stages first."""
    commands = [command for stage in reversed(run.stages) for command in _spec(stage).next_steps(stage)]
    return [*dict.fromkeys(commands), f"bessemer show {run.name}"]


#: Figures worth seeing even when they are equal.
_ALWAYS = {"bits_per_byte", "parameters", "bytes_per_token"}
#: Prefixes of figures that a comparison of runs leaves out, since there are dozens; `bessemer show A --against B` has them.
_DETAILS = ("by_domain.",)
_LONGEST = 40


def compare_runs(first: RunFolder, second: RunFolder) -> list[Part]:
    """A table of settings and one of figures, stage by stage."""
    manifests = [{stage: run.manifest(stage) or {} for stage in run.stages()} for run in (first, second)]
    parts: list[Part] = []
    for title, section in (("Settings that differ", "settings"), ("Figures", "metrics")):
        rows = [
            (stage, key, *map(_figure, values))
            for stage in dict.fromkeys([*manifests[0], *manifests[1]])
            for key, values in _paired(*(_flat(side.get(stage, {}).get(section, {})) for side in manifests)).items()
            if _is_figure(section, key, values)
        ]
        columns = [Column("Stage"), Column("Key"), Column(first.name, True), Column(second.name, True)]
        parts += [Heading(title), Table(columns, rows) if rows else Text("None.")]
    return parts


def _paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])}


def _is_figure(section: str, key: str, values: tuple[Any, Any]) -> bool:
    if section == "metrics" and (key.startswith(_DETAILS) or not any(isinstance(value, (int, float)) for value in values)):
        return False
    return values[0] != values[1] or (section == "metrics" and key in _ALWAYS)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {
        key: value for name, item in values.items() for key, value in _flat(item, f"{path}.{name}" if path else name).items()
    }


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
