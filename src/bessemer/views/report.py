"""The report of a run as one HTML file that needs no network, and each kind of report data as HTML.

Histograms of scores are SVG in the page's colours. Their heights are square roots of counts, so that a few documents near a
threshold are visible next to many far from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise

import numpy as np
from markupsafe import Markup

from bessemer.core import report
from bessemer.core.metrics import duration, short_number, size
from bessemer.core.report import (
    Answer,
    Bin,
    Cell,
    Column,
    Document,
    Facts,
    Heading,
    Histogram,
    Part,
    ReportData,
    Sample,
    Section,
    StageRun,
    Table,
    Text,
    Verbatim,
)
from bessemer.views.charts import line_chart
from bessemer.views.elements import (
    bar_html,
    facts_html,
    heat_map,
    lead,
    logarithmic_shades,
    measured,
    render_page,
    soft,
    table,
    token_list,
    tokens_html,
)


def documents_html(given: Sequence[Document]) -> Markup:
    """Documents with their source, id and the reason why they were dropped."""
    return Markup("").join(
        Markup('<article class="document"><header>{}{}{}</header><pre>{}</pre></article>').format(
            document.source,
            Markup(' <span class="id">{}</span>').format(document.id) if document.id else "",
            Markup(' <span class="reason">{}</span>').format(document.reason) if document.reason else "",
            document.text,
        )
        for document in given
    )


def samples_html(given: Sequence[Sample]) -> Markup:
    """What the model wrote at several points of training, by step."""
    steps: dict[int, list[Sample]] = {}
    for sample in given:
        steps.setdefault(sample.step, []).append(sample)
    return Markup("").join(
        Markup('<section class="sample"><h4>Step {:,}</h4>{}</section>').format(
            step,
            Markup("").join(
                Markup('<p><span class="prompt">{}</span>{}</p>').format(sample.prompt, sample.text) for sample in at_step
            ),
        )
        for step, at_step in sorted(steps.items())
    )


def answers_html(given: Sequence[Answer]) -> Markup:
    """Questions with the expected answer and the model's; those it was trained on are marked as memorised."""
    return Markup("").join(_answer(answer) for answer in given)


def _answer(answer: Answer) -> Markup:
    verdict = {True: "exact", False: "differs", None: ""}[answer.correct]
    where = "held in: memorised" if answer.held_in else "held out"
    return Markup(
        '<article class="answer"><header>{} <span class="soft">{}</span></header><dl><dt>Expected</dt><dd>{}</dd>'
        '<dt>{}</dt><dd>{} <span class="verdict {}">{}</span></dd></dl></article>'
    ).format(answer.question, where, answer.expected, answer.model or "Model", answer.answer, verdict, verdict)


_WIDTH, _HEIGHT, _LABELS = 240.0, 64.0, 14.0
#: Width of the block for values beyond the axis, and its distance from the axis.
_BLOCK, _GAP = 9.0, 5.0
_NARROWEST = 3.0


def drawings(histograms: Sequence[Histogram], ids: Iterator[str]) -> Markup:
    """Histograms side by side. ids: names for the drawings, unique in the page."""
    return Markup('<div class="histograms">{}</div>').format(
        Markup("").join(_figure(histogram, next(ids)) for histogram in histograms)
    )


def _figure(histogram: Histogram, name: str) -> Markup:
    return Markup('<figure class="histogram"><figcaption>{} <span class="soft">{}</span></figcaption>{}</figure>').format(
        histogram.title, histogram.effect, _drawing(histogram, name)
    )


@dataclass(frozen=True)
class _Layout:
    """Where everything is drawn: bars as (bin, x, width), the limits' x, and where the axis begins and ends."""

    bars: Sequence[tuple[Bin, float, float]]
    limits: Sequence[float]
    start: float
    end: float


def _layout(histogram: Histogram) -> _Layout:
    """Bars over an axis from `low` to `high`, with blocks at its ends for values beyond.

    A bin too narrow to be seen is drawn wider, such as the one value 0 under a limit of 0. A limit beyond the axis is drawn
    between the blocks that it separates.
    """
    before = [bin for bin in histogram.bins if bin.start < histogram.low and bin.count]
    after = [bin for bin in histogram.bins if bin.end > math.nextafter(histogram.high, math.inf) and bin.count]
    inside = [
        bin for bin in histogram.bins if bin.start >= histogram.low and bin.end <= math.nextafter(histogram.high, math.inf)
    ]
    start, end = len(before) * (_BLOCK + _GAP), _WIDTH - len(after) * (_BLOCK + _GAP)
    natural = [(end - start) * (bin.end - bin.start) / (histogram.high - histogram.low) for bin in inside]
    widths = [max(width, _NARROWEST if bin.count else 0.0) for bin, width in zip(inside, natural, strict=True)]
    ends = [start + (end - start) * width / sum(widths) for width in accumulate(widths, initial=0.0)]

    bars = [(bin, number * (_BLOCK + _GAP), _BLOCK) for number, bin in enumerate(before)]
    bars += [(bin, left, right - left) for bin, (left, right) in zip(inside, pairwise(ends), strict=True) if bin.count]
    bars += [(bin, end + _GAP + number * (_BLOCK + _GAP), _BLOCK) for number, bin in enumerate(after)]
    limits = [
        left for (one_bin, left), (next_bin, _) in pairwise(zip(inside, ends[1:], strict=True)) if one_bin.kept != next_bin.kept
    ]
    if histogram.lowest is not None and histogram.lowest <= histogram.low:
        limits += [x + width + _GAP / 2 for bin, x, width in bars if bin.start < histogram.lowest]
    if histogram.highest is not None and histogram.highest >= histogram.high:
        limits += [x - _GAP / 2 for bin, x, _ in bars if bin.start > histogram.highest]
    return _Layout(bars, limits, start, end)


def _drawing(histogram: Histogram, name: str) -> Markup:
    layout, tallest = _layout(histogram), math.sqrt(max((bin.count for bin in histogram.bins), default=0) or 1)
    bars = (_bar(x, width, _HEIGHT * math.sqrt(bin.count) / tallest, bin.kept) for bin, x, width in layout.bars)
    dashes = (
        Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1:.1f}"/>').format(x, _HEIGHT) for x in layout.limits
    )
    axis = f"{short_number(histogram.low)} to {short_number(histogram.high)}"
    described = f"{axis}, {histogram.documents:,} documents. {histogram.effect}".strip()
    return Markup(
        '<svg viewBox="0 0 {0:g} {1:g}" xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{2}-title {2}-desc">'
        '<title id="{2}-title">{3}</title><desc id="{2}-desc">{4}</desc>{5}{6}'
        '<line class="axis" x1="{7:.1f}" x2="{8:.1f}" y1="{9:g}" y2="{9:g}"/>'
        '<text x="{7:.1f}" y="{1:g}">{10}</text><text class="end" x="{8:.1f}" y="{1:g}">{11}</text></svg>'
    ).format(
        _WIDTH,
        _HEIGHT + _LABELS,
        name,
        histogram.title,
        described,
        Markup("").join(bars),
        Markup("").join(dashes),
        layout.start,
        layout.end,
        _HEIGHT,
        short_number(histogram.low),
        short_number(histogram.high),
    )


def _bar(x: float, width: float, height: float, kept: bool) -> Markup:
    height = max(height, 1.0)
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        "kept" if kept else "dropped", x, _HEIGHT - height, max(width - 0.5, 0.5), height
    )


def draw_section(section: report.Section, name: str) -> Markup:
    """The parts of a section below its heading. name: unique in the page, it begins the ids of the section's drawings."""
    return draw_parts(section.parts, (f"{name}-{number}" for number in count(1)))


def draw_parts(parts: Sequence[report.Part], ids: Iterator[str]) -> Markup:
    """Parts one after the other. Every text is escaped. ids: names for the drawings, unique in the page."""
    return Markup("").join(draw(part, ids) for part in parts)


def draw(part: report.Part, ids: Iterator[str]) -> Markup:
    """One part. Empty when there is nothing to draw in it."""
    match part:
        case report.Heading(text, level):
            return Markup("<h{0}>{1}</h{0}>").format(level, text)
        case report.Text(text, is_lead):
            return lead(text) if is_lead else soft(text)
        case report.Verbatim(text):
            return Markup("<pre>{}</pre>").format(text)
        case report.Facts(values):
            return facts_html(values)
        case report.Table():
            return _table(part)
        case report.Curves():
            return line_chart(part, name=next(ids))
        case report.Histograms(histograms):
            return drawings(histograms, ids)
        case report.HeatMaps(maps):
            return Markup('<div class="heats">{}</div>').format(Markup("").join(map(_heat_map, maps)))
        case report.Tokens(pieces, listed):
            return token_list(pieces) if listed else tokens_html(pieces)
        case report.Documents(shown):
            return documents_html(shown)
        case report.Answers(given):
            return answers_html(given)
        case report.Samples(written):
            return samples_html(written)
        case report.Folded():
            return _folded(part, ids)
    raise AssertionError(part)


def _table(part: report.Table) -> Markup:
    drawn = table(part.columns, [[_cell(cell) for cell in row] for row in part.rows])
    return Markup('<div class="{}-bars">{}</div>').format(part.bars, drawn) if part.bars else drawn


def _cell(cell: str | report.Cell) -> str | Markup:
    if isinstance(cell, str):
        return cell
    if cell.share is not None:
        return measured(cell.share, cell.text) if cell.text else bar_html(cell.share, cell.rest)
    text: str | Markup = cell.text
    if cell.strong:
        text = Markup("<b>{}</b>").format(text)
    if cell.warning:
        text = Markup('<span class="differs">{}</span>').format(text)
    if cell.remark:
        remark = Markup('<span class="soft">{}</span>').format(cell.remark)
        text = Markup("{} {}").format(text, remark) if text else remark
    return text


def _folded(part: report.Folded, ids: Iterator[str]) -> Markup:
    body = draw_parts(part.parts, ids)
    if isinstance(part.summary, str):
        return Markup("<details><summary>{}</summary>{}</details>").format(part.summary, body)
    drawn = (_cell(cell) for cell in part.summary)
    cells = Markup("").join(cell if isinstance(cell, Markup) else Markup("<span>{}</span>").format(cell) for cell in drawn)
    return Markup('<details class="folded-row"><summary>{}</summary>{}</details>').format(cells, body)


def _heat_map(part: report.HeatMap) -> Markup:
    values = np.array(part.values)
    return heat_map(
        values,
        title=part.title,
        shown=lambda value: f"{value:.3g}",
        rows=part.row_kind,
        columns=part.column_kind,
        shades_LH=logarithmic_shades(values) if part.logarithmic else None,
        row_names=part.row_names,
        column_names=part.column_names,
    )


def render_report(report: ReportData) -> str:
    """The whole page. Every text from outside is escaped; the same data gives the same bytes."""
    sections = [section for section in (_pipeline(report), *report.sections, _environment(report), _recipe(report)) if section]
    names = _anchors([section.title for section in sections])
    drawn = [(name, section.title, draw_section(section, name)) for name, section in zip(names, sections, strict=True)]
    return render_page("report.html.jinja", ["style.css"], report=report, sections=drawn)


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
