"""The report of a run: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bessemer.core.figures import duration, size
from bessemer.core.report import Cell, Column, Facts, Heading, Part, Section, Table, Text, Verbatim
from bessemer.views.parts import draw_section
from bessemer.views.run_data import ReportData, StageRun


def render_report(report: ReportData) -> str:
    """The whole page. Every text from outside is escaped; the same data gives the same bytes."""
    sections = [section for section in (_pipeline(report), *report.sections, _environment(report), _recipe(report)) if section]
    names = _anchors([section.title for section in sections])
    drawn = [(name, section.title, draw_section(section, name)) for name, section in zip(names, sections, strict=True)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = resources.files("bessemer.views")
    template = environment.from_string(files.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style = Markup(files.joinpath("style.css").read_text(encoding="utf-8"))
    return template.render(report=report, style=style, sections=drawn)


def _anchors(titles: Sequence[str]) -> list[str]:
    """A name for each title that is unique in the page: its ASCII letters and digits, numbered where it repeats."""
    anchors: list[str] = []
    for title in titles:
        words = re.sub(r"[^a-z0-9]", "", title.lower().removeprefix("the ")) or "section"
        anchor, number = words, 1
        while anchor in (*anchors, "top"):
            number += 1
            anchor = f"{words}-{number}"
        anchors.append(anchor)
    return anchors


def _pipeline(report: ReportData) -> Section | None:
    if not report.stages:
        return None
    total = duration(sum(stage.seconds for stage in report.stages))
    lead = Text(f"{len(report.stages)} stages, {total} of work.", lead=True)
    return Section("The pipeline", [lead, stages_table(report.stages)])


def stages_table(stages: Sequence[StageRun]) -> Table:
    """Every stage with the time and memory that it took when it was made, as bars."""
    longest = max((stage.seconds for stage in stages), default=0) or 1
    largest = max((stage.peak_memory_bytes or 0 for stage in stages), default=0) or 1
    rows: list[tuple[str | Cell, ...]] = [
        (
            Cell(stage.name, strong=True),
            stage.summary,
            Cell(duration(stage.seconds), share=stage.seconds / longest),
            Cell(size(stage.peak_memory_bytes), share=stage.peak_memory_bytes / largest) if stage.peak_memory_bytes else "–",
        )
        for stage in stages
    ]
    return Table([Column("Stage"), Column("What it made"), Column("Time", True), Column("Peak memory", True)], rows)


def _environment(report: ReportData) -> Section | None:
    if not report.host and not report.versions:
        return None
    return Section("Environment", [Facts({**report.host, "commit": report.commit, **report.versions})])


def _recipe(report: ReportData) -> Section | None:
    named = (("As run", report.recipe), ("Locked, with what was measured on this machine", report.lock))
    parts: list[Part] = []
    for title, text in named:
        if text:
            parts += [Heading(title), Verbatim(text)]
    return Section("Recipe", parts) if parts else None
