"""XLSX as Markdown: a section for each sheet, its tables one after the other, each with its header.

Rows without content divide a sheet into tables, whose first rows are their headers. Hidden sheets are left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import chain

from bessemer.core.workbook import Cell, Sheet, Workbook, WorkbookError
from bessemer.retrieval.reading.markdown import MarkdownWriter, ReadText, one_line

#: Most columns that are read: a sheet has up to 16,384, of which the last are never a table's.
_MOST_COLUMNS = 1000
#: A cell of more characters is text and no value.
_LONGEST_VALUE = 80


def read_xlsx(data: bytes, max_bytes: int) -> ReadText:
    """The text of a workbook. Raises ValueError for a damaged one."""
    writer = MarkdownWriter(max_bytes)
    try:
        book = Workbook(io.BytesIO(data))
        for sheet in book.sheets:
            if not sheet.is_hidden and not writer.is_full:
                _write_sheet(sheet.name, _rows(book, sheet, max_bytes), writer)
    except WorkbookError as error:
        raise ValueError(f"it {error}") from None
    if hidden := sum(sheet.is_hidden for sheet in book.sheets):
        writer.notes.append(f"{hidden} hidden sheets were left out")
    return writer.finish()


def _rows(book: Workbook, sheet: Sheet, max_bytes: int) -> Iterator[list[str]]:
    """The rows of a sheet as text, until there are `max_bytes` of it; an empty one where rows are left out."""
    before = size = 0
    for number, row in book.rows(sheet, as_shown=True):
        if number > before + 1:
            yield []
        before = number
        cells = [_shown(cell) for cell in row[:_MOST_COLUMNS]]
        yield cells
        size += sum(map(len, cells))
        if size > max_bytes:
            return


def _shown(cell: Cell) -> str:
    """The value of a cell as a person writes it."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    return f"{cell:.15g}" if isinstance(cell, float) else one_line(str(cell))


def _write_sheet(name: str, rows: Iterable[list[str]], writer: MarkdownWriter) -> None:
    """A sheet as a section; nothing where it is empty."""
    has_heading = False
    table: list[list[str]] = []
    for row in chain(rows, [[]]):
        if any(row):
            table.append(row)
        elif table:
            if not has_heading:
                writer.heading(1, name)
                has_heading = True
            _write_table(table, writer)
            table = []


def _write_table(rows: list[list[str]], writer: MarkdownWriter) -> None:
    texts = [cell for row in rows for cell in row if cell]
    if len(texts) == len(rows) and (len(rows) == 1 or max(map(len, texts)) > _LONGEST_VALUE):
        # a column of text; of values, the first is their name
        for text in texts:
            writer.paragraph([text])
    else:
        writer.table(rows)
