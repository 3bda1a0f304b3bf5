"""The order in which the lines of a PDF's pages are read, and the lines that pages repeat.

Columns: a gutter is sought that many lines end before and many begin behind. Lines that cross it divide the page into bands; in
a band with running text on both sides the left side is read before the right one, each in the same way. Parts of a row that
are no running text, as in a table without rules or a form, stay together in their row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bessemer.retrieval.chunks import Box
from bessemer.retrieval.reading.pdf_lines import Line, rows_of

#: A column has at least so many lines, of so many characters in the middle, which fill so much of its width.
_FEWEST_LINES, _FEWEST_CHARACTERS, _FILLED = 3, 12, 0.3
#: Rows of cells with fewer characters in the middle are a table where nearly all of them stand side by side.
_CELL_CHARACTERS, _SIDE_BY_SIDE = 28, 0.8
_MOST_DEPTH = 6
#: How far lines may reach over the edge of their column, in points.
_ROUGH_EDGE = 3.0
#: Parts of a page's height at its top and bottom where running lines and page numbers stand, and rows that are looked at there.
_MARGIN, _NUMBER_MARGIN, _MARGIN_ROWS = 0.12, 0.2, 3
_PAGE_NUMBER = re.compile(
    r"(?i)\W*(?:(?:page|seite|p\.|s\.|slide|folie)\s*)?(?:\d{1,5}|[ivxlc]{1,7})(?:\s*(?:/|of|von|sur|de)\s*\d{1,5})?\W*"
)


@dataclass(frozen=True)
class Table:
    """A table with ruled lines. rows: its cells' text; boxes: of the rows."""

    box: Box
    rows: tuple[tuple[str, ...], ...]
    boxes: tuple[Box, ...]


Item = Line | Table


def in_reading_order(items: Sequence[Item]) -> list[list[Item]]:
    """Lines and tables of a page in the order of reading; those of one list stand below each other in one column."""
    return _ordered(list(items), 0)


def _ordered(items: list[Item], depth: int) -> list[list[Item]]:
    gutter = _gutter(items) if depth < _MOST_DEPTH else None
    if gutter is None:
        return [_stacked(items)] if items else []
    result: list[list[Item]] = []
    waiting: list[Item] = []
    for band, sides in _bands(items, gutter):
        if sides is None:
            waiting += band
            continue
        if waiting:
            result += _ordered(waiting, depth + 1)
            waiting = []
        for side in sides:
            result += _ordered(side, depth + 1)
    return result + (_ordered(waiting, depth + 1) if waiting else [])


def _bands(items: Sequence[Item], gutter: float) -> list[tuple[list[Item], tuple[list[Item], list[Item]] | None]]:
    """Items from top to bottom in bands: those that cross the gutter, and those between two of them; of a band with a column
    on each side both sides."""
    crossing = sorted((item for item in items if _crosses(item.box, gutter)), key=lambda item: _middle(item.box))
    others = sorted((item for item in items if not _crosses(item.box, gutter)), key=lambda item: _middle(item.box))
    bands: list[tuple[list[Item], tuple[list[Item], list[Item]] | None]] = []
    number = 0
    for border in [*crossing, None]:
        band: list[Item] = []
        while number < len(others) and (border is None or _middle(others[number].box) <= _middle(border.box)):
            band.append(others[number])
            number += 1
        if band:
            left = [item for item in band if item.box[0] + item.box[2] <= 2 * gutter]
            right = [item for item in band if item.box[0] + item.box[2] > 2 * gutter]
            bands.append((band, (left, right) if _are_columns(left, right) else None))
        if border is not None:
            bands.append(([border], None))
    return bands


def _crosses(box: Box, gutter: float) -> bool:
    return box[0] < gutter - _ROUGH_EDGE and box[2] > gutter + _ROUGH_EDGE


def _gutter(items: Sequence[Item]) -> float | None:
    """Where columns are divided: the place with the most lines in them; None where there are no columns."""
    lines = [item for item in items if isinstance(item, Line)]
    if len(lines) < 2 * _FEWEST_LINES:
        return None
    begins = Counter(round(line.box[0] / 2) for line in lines)
    places = sorted({min(line.box[0] for line in lines if round(line.box[0] / 2) == place) - 0.5
                     for place, count in begins.items() if count >= 2})  # fmt: skip
    best, most = None, 0
    for place in places:
        if sum(line.box[2] <= place + _ROUGH_EDGE for line in lines) < _FEWEST_LINES:
            continue
        count = sum(len(band) for band, sides in _bands(items, place) if sides is not None)
        if count > most:
            best, most = place, count
    return best


def _are_columns(left: Sequence[Item], right: Sequence[Item]) -> bool:
    """Whether items on two sides of a gutter are two columns of running text."""
    sides = [[item for item in side if isinstance(item, Line)] for side in (left, right)]
    if any(len(side) < _FEWEST_LINES for side in sides):
        return False
    spans = [(min(line.box[1] for line in side), max(line.box[3] for line in side)) for side in sides]
    together = min(spans[0][1], spans[1][1]) - max(spans[0][0], spans[1][0])
    if together < 0.3 * min(bottom - top for top, bottom in spans):
        return False
    size = median(line.size for side in sides for line in side)
    if min(line.box[0] for line in sides[1]) - max(line.box[2] for line in sides[0]) < 0.5 * size:
        return False
    lengths = [median(len(line.text) for line in side) for side in sides]
    for side, length in zip(sides, lengths, strict=True):
        width = max(line.box[2] for line in side) - min(line.box[0] for line in side)
        if length < _FEWEST_CHARACTERS or median(line.width for line in side) < _FILLED * width:
            return False
    if min(lengths) >= _CELL_CHARACTERS:
        return True
    shorter, longer = sorted(sides, key=len)
    beside = sum(any(abs(line.base - other.base) < 0.3 * size for other in longer) for line in shorter)
    return beside < _SIDE_BY_SIDE * len(longer)


def _stacked(items: Sequence[Item]) -> list[Item]:
    """The items of one column from top to bottom; lines side by side become one line of cells."""
    rows: list[Item] = [item for item in items if isinstance(item, Table)]
    for row in rows_of([item for item in items if isinstance(item, Line)]):
        if len(row) == 1:
            rows.append(row[0])
            continue
        box = (
            row[0].box[0],
            min(line.box[1] for line in row),
            max(line.box[2] for line in row),
            max(line.box[3] for line in row),
        )
        widest = max(row, key=lambda line: len(line.text))
        is_bold, is_fixed = all(line.is_bold for line in row), all(line.is_fixed for line in row)
        text = "   ".join(line.text for line in row)
        rows.append(Line(text, box, widest.base, widest.size, is_bold, is_fixed, cells=tuple(row)))
    return sorted(rows, key=lambda item: _middle(item.box))


def _middle(box: Box) -> float:
    return (box[1] + box[3]) / 2


def without_running_lines(pages: Sequence[Sequence[Line]], heights: Sequence[float]) -> list[list[Line]]:
    """The lines of a document's pages without headers, footers and page numbers: what stands in the margin of several pages at
    one height with the same words, numbers aside; and a number alone at the edge.

    heights: of the pages, in points. The same words on two pages are enough in a document of up to five.
    """
    repeats = 2 if len(pages) <= 5 else 3
    marked: list[list[tuple[Line, tuple[str, int] | None, bool]]] = []
    counts: Counter[tuple[str, int]] = Counter()
    for lines, height in zip(pages, heights, strict=True):
        rows = rows_of(lines)
        edges = {
            id(line): number == 0
            for side in (rows[:_MARGIN_ROWS], rows[: -_MARGIN_ROWS - 1 : -1])
            for number, row in enumerate(side)
            for line in row
        }
        page: list[tuple[Line, tuple[str, int] | None, bool]] = []
        for line in lines:
            from_edge = min(line.box[3], height - line.box[1])
            is_number = edges.get(id(line), False) and _PAGE_NUMBER.fullmatch(line.text) is not None
            if id(line) not in edges or from_edge > (_NUMBER_MARGIN if is_number else _MARGIN) * height:
                page.append((line, None, False))
                continue
            is_top = line.box[3] < height / 2
            words = re.sub(r"\d+|\b[ivxlc]+$", "#", line.text.lower())
            key = (words, round((line.base if is_top else line.base - height) / 6))
            page.append((line, key, is_number))
        counts.update({key for _, key, _ in page if key is not None})
        marked.append(page)

    def is_running(key: tuple[str, int] | None, is_number: bool) -> bool:
        if key is None:
            return False
        # at the border of two rounded heights
        return is_number or sum(counts[key[0], key[1] + step] for step in (-1, 0, 1)) >= repeats

    return [[line for line, key, is_number in page if not is_running(key, is_number)] for page in marked]


def as_tables(column: Sequence[Item]) -> list[Item]:
    """A column's items, in which three or more rows of equally many cells, each below that of the row above, are a table."""
    result: list[Item] = []
    rows: list[Line] = []

    def end() -> None:
        if len(rows) >= 3:
            boxes = tuple(line.box for line in rows)
            cells = tuple(tuple(cell.text for cell in line.cells) for line in rows)
            result.append(Table(_around(boxes), cells, boxes))
        else:
            result.extend(rows)
        rows.clear()

    for item in column:
        if isinstance(item, Line) and item.cells:
            if rows and not _are_below(rows, item):
                end()
            rows.append(item)
        else:
            end()
            result.append(item)
    end()
    return result


def _are_below(rows: Sequence[Line], line: Line) -> bool:
    """Whether the cells of a row stand below those of the rows above it, and belong to no column beside."""
    if len(line.cells) != len(rows[0].cells) or line.box[1] - rows[-1].box[3] > 1.5 * line.size:
        return False
    all_rows = [*rows, line]
    edges = [
        (min(row.cells[place].box[0] for row in all_rows), max(row.cells[place].box[2] for row in all_rows))
        for place in range(len(line.cells))
    ]
    return all(before[1] < after[0] for before, after in pairwise(edges))


def _around(boxes: Iterable[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)
