"""PPTX as Markdown: a section for each slide, with its title, its shapes from top to bottom, and its notes.

Dates, footers and slide numbers are left out, and hidden slides. A passage's page is its slide's number.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

from bessemer.retrieval.reading.markdown import Area, MarkdownWriter, Piece, ReadText, described_title, one_line

#: Shapes whose upper edges are within this much are read from left to right: a quarter of an inch, in the file's own unit.
_SAME_ROW = 228_600
_MOST_DEPTH = 20
_MOST_POINTS = 2000


def read_pptx(data: bytes, max_bytes: int) -> ReadText:
    """The text of a presentation. Raises ValueError for what is none, and what `python-pptx` raises for a damaged one."""
    import pptx

    try:
        presentation = pptx.Presentation(io.BytesIO(data))
    except ValueError:
        # its text names an object in memory
        raise ValueError("its content is no presentation, or one of another suffix") from None
    writer = MarkdownWriter(max_bytes)
    hidden = 0
    for number, slide in enumerate(presentation.slides, start=1):
        if slide._element.get("show") in ("0", "false"):
            hidden += 1
        else:
            _write_slide(slide, Area(number), writer)
        if writer.is_full:
            break
    if hidden:
        writer.notes.append(f"{hidden} hidden slides were left out")
    return writer.finish(described_title(presentation.core_properties.title))


def _write_slide(slide: Any, area: Area, writer: MarkdownWriter) -> None:
    title_shape = slide.shapes.title
    title = one_line(title_shape.text_frame.text) if title_shape is not None else ""
    writer.heading(1, title or f"Slide {area.page}", area)
    has_body = False
    for shape in _in_order(slide.shapes):
        if title_shape is None or shape.shape_id != title_shape.shape_id:
            has_body |= _write_shape(shape, area, writer)
    notes = slide.notes_slide.notes_text_frame if slide.has_notes_slide else None
    if notes is not None and (text := one_line(notes.text)):
        writer.paragraph([Piece(f"Notes: {text}", area)])
        has_body = True
    if title and not has_body:
        # a heading alone is in no passage
        writer.paragraph([Piece(title, area)])


def _in_order(shapes: Iterable[Any], depth: int = 0) -> Iterator[Any]:
    """Shapes from top to bottom, those of one row from left to right; groups are taken apart."""
    rows: list[list[Any]] = []
    for shape in sorted(shapes, key=lambda shape: shape.top or 0):
        if rows and (shape.top or 0) - (rows[-1][0].top or 0) <= _SAME_ROW:
            rows[-1].append(shape)
        else:
            rows.append([shape])
    for row in rows:
        for shape in sorted(row, key=lambda shape: shape.left or 0):
            if hasattr(shape, "shapes"):
                if depth < _MOST_DEPTH:
                    yield from _in_order(shape.shapes, depth + 1)
            elif not _is_running(shape):
                yield shape


def _is_running(shape: Any) -> bool:
    """Whether it is what every slide repeats."""
    from pptx.enum.shapes import PP_PLACEHOLDER

    repeated = (PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.SLIDE_NUMBER, PP_PLACEHOLDER.HEADER)
    return shape.is_placeholder and shape.placeholder_format.type in repeated


def _write_shape(shape: Any, area: Area, writer: MarkdownWriter) -> bool:
    """Write a shape's text. Returns whether it has any."""
    if getattr(shape, "has_table", False):
        rows = [[_cell_text(cell) for cell in row.cells] for row in shape.table.rows]
        writer.table(rows, [area] * len(rows))
        return any(any(row) for row in rows)
    if getattr(shape, "has_chart", False):
        return _write_chart(shape.chart, area, writer)
    if not shape.has_text_frame:
        return False
    lines = [(paragraph.level, text) for paragraph in shape.text_frame.paragraphs if (text := one_line(paragraph.text))]
    # the body of a slide is a list, as a rule
    is_list = len(lines) > 1 and (shape.is_placeholder or any(level for level, _ in lines))
    shown = [f"{'  ' * level}- {text}" if is_list else text for level, text in lines]
    writer.paragraph(Piece(("\n" if number else "") + line, area) for number, line in enumerate(shown))
    return bool(lines)


def _cell_text(cell: Any) -> str:
    return "" if cell.is_spanned else str(cell.text_frame.text)


def _write_chart(chart: Any, area: Area, writer: MarkdownWriter) -> bool:
    """A chart's title, and its values as a table. Those of kinds that `python-pptx` does not know are left out."""
    title = one_line(chart.chart_title.text_frame.text) if chart.has_title and chart.chart_title.has_text_frame else ""
    rows: list[list[str]] = []
    try:
        plot = chart.plots[0]
        series = list(plot.series)
        categories = [str(category) for category in plot.categories][:_MOST_POINTS]
        if categories:
            rows.append(["", *(str(one.name) for one in series)])
            values = [list(one.values) for one in series]
            for number, category in enumerate(categories):
                rows.append([category, *(_shown(one[number]) if number < len(one) else "" for one in values)])
    except (IndexError, KeyError, NotImplementedError, ValueError, AttributeError):
        rows = []
    if title:
        writer.paragraph([Piece(title, area)])
    writer.table(rows, [area] * len(rows))
    return bool(title or rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.15g}"
