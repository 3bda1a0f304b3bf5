"""Tables of a PDF that are drawn with lines, by `pdfplumber`.

`pdfplumber` reads a page anew, in pure Python, which takes many times as long as pdfium. So it is asked only about pages on
which pdfium finds lines or frames.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from bessemer.retrieval.chunks import Box, united
from bessemer.retrieval.reading.pdf_lines import Geometry, Line
from bessemer.retrieval.reading.pdf_order import Table

#: What is drawn on a page with a table: so many rules or frames at least, and at most so many objects, as a chart has more.
_FEWEST_RULES, _FEWEST_FRAMES, _MOST_OBJECTS = 3, 4, 4000
#: Thickest rule, and shortest one, in points.
_THIN, _SHORTEST = 3.0, 15.0
#: Share of a table's cells that have text; the grid of a chart has less.
_FILLED = 0.4
#: A word that is divided between the lines of a cell.
_CUT = re.compile(r"(?<=[^\W\d_])[-‐\xad]\n(?=[a-zß-öø-ÿ])")


class TableFinder:
    """Finds the tables of a document."""

    def __init__(self, data: bytes) -> None:
        """Raises ImportError where `pdfplumber` is missing."""
        import pdfplumber

        self._open = lambda: pdfplumber.open(io.BytesIO(data))
        self._document: Any = None

    def tables(self, number: int, lines: Sequence[Line], display: Geometry, frame: Geometry) -> tuple[list[Table], list[Line]]:
        """The tables of a page, counted from 0, and the lines outside them. lines: in the picture `frame`; `display`: the
        picture that is shown."""
        if self._document is None:
            self._document = self._open()
        page = self._document.pages[number]
        try:
            found = page.find_tables()
            offset = _offset(page, display)
            tables: list[Table] = []
            for one in found:
                rows = [[cell and display.shown(_moved(cell, offset), frame) for cell in row.cells] for row in one.rows]
                table = _table(rows, one.extract())
                if table is not None:
                    tables.append(table)
                    lines = [line for line in lines if not _is_inside(line.box, table.box)]
            return tables, list(lines)
        finally:
            page.close()

    def close(self) -> None:
        """Close the document."""
        if self._document is not None:
            self._document.close()


def has_rules(page: Any) -> bool:
    """Whether lines or frames are drawn on a page, as around the cells of a table."""
    import pypdfium2.raw as pdfium

    rules = frames = 0
    for number, item in enumerate(page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_PATH])):
        if number >= _MOST_OBJECTS:
            return False
        left, bottom, right, top = item.get_bounds() if hasattr(item, "get_bounds") else item.get_pos()
        width, height = right - left, top - bottom
        if max(width, height) < _SHORTEST:
            continue
        if min(width, height) < _THIN:
            rules += 1
        else:
            frames += 1
    return rules >= _FEWEST_RULES or frames >= _FEWEST_FRAMES


def _offset(page: Any, display: Geometry) -> tuple[float, float]:
    """From pdfplumber's coordinates, of the whole page as it is turned, to those of what is shown of it."""
    left, bottom, right, top = page.mediabox
    whole = Geometry((min(left, right), min(bottom, top), max(left, right), max(bottom, top)), display.turns)
    u, v = whole.point(left, bottom)
    shown_u, shown_v = display.point(left, bottom)
    return shown_u - u - page.bbox[0], shown_v - v - page.bbox[1]


def _rows_in(texts: Sequence[str | None]) -> list[tuple[str, ...]]:
    """The rows that a row between two rules holds: several where all cells have equally many lines, of numbers for the most
    part."""
    cells = [text.split("\n") if text else [] for text in texts]
    lines = [cell for cell in cells if cell]
    numbers = sum(all(any(map(str.isdigit, line)) for line in cell) for cell in lines)
    if len(lines) >= 3 and len(set(map(len, lines))) == 1 and 2 * numbers >= len(lines):
        return [tuple(cell[place] if cell else "" for cell in cells) for place in range(len(lines[0]))]
    return [tuple(_CUT.sub("", text or "") for text in texts)]


def _moved(box: Box, offset: tuple[float, float]) -> Box:
    return box[0] + offset[0], box[1] + offset[1], box[2] + offset[0], box[3] + offset[1]


def _is_inside(inner: Box, outer: Box) -> bool:
    """Whether the middle of a box is in another."""
    return outer[0] <= (inner[0] + inner[2]) / 2 <= outer[2] and outer[1] <= (inner[1] + inner[3]) / 2 <= outer[3]


def _table(cells: Sequence[Sequence[Box | None]], texts: Sequence[Sequence[str | None]]) -> Table | None:
    """A table from the boxes of its rows' cells and their texts; None for what is no table: a frame around text, or the grid
    of a chart."""
    boxes: list[Box] = []
    rows: list[tuple[str, ...]] = []
    count = filled = 0
    for row, own in zip(cells, texts, strict=True):
        box: Box | None = None
        for cell in row:
            box = united(box, cell)
        if box is not None:
            count += sum(cell is not None for cell in row)
            filled += sum(map(bool, own))
            for part in _rows_in(own):
                boxes.append(box)
                rows.append(part)
    if len(rows) < 2 or max(map(len, rows)) < 2 or count < 4 or filled < _FILLED * count:
        return None
    around = (min(box[0] for box in boxes), boxes[0][1], max(box[2] for box in boxes), max(box[3] for box in boxes))
    return Table(around, tuple(rows), tuple(boxes))
