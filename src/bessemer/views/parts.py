"""Each kind of report data as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from markupsafe import Markup

from bessemer.core import report
from bessemer.views.bars import bar, measured
from bessemer.views.charts import line_chart
from bessemer.views.examples import answers, documents, samples
from bessemer.views.heat import heat_map, logarithmic_shades
from bessemer.views.scores import drawings
from bessemer.views.tables import facts, lead, soft, table
from bessemer.views.tokens import token_list, tokens_html


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
            return facts(values)
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
        case report.Documents(found):
            return documents(found)
        case report.Answers(given):
            return answers(given)
        case report.Samples(written):
            return samples(written)
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
        return measured(cell.share, cell.text) if cell.text else bar(cell.share, cell.rest)
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
    cells = Markup("").join(one if isinstance(one, Markup) else Markup("<span>{}</span>").format(one) for one in drawn)
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
