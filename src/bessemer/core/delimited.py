"""Text tables whose columns are separated by a character: the delimiter detected, rows with the line that they begin in."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import islice

#: Characters that may separate the columns of a table → their names.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
#: Suffix of a file → its usual delimiter.
DELIMITERS_OF = {".csv": ",", ".tsv": "\t"}
#: Rows from which the delimiter is detected.
_ROWS_LOOKED_AT = 200


def delimiter_of(text: str, usual: str) -> tuple[str, int]:
    """The delimiter of a table, and how many lines before the header declare it (Excel's `sep=;`).

    It is the one by which the most rows have as many cells as the header, at least two; of several the usual one, then the one
    that gives the most columns. `csv.Sniffer` compares counts of characters instead, and takes commas inside German numbers, or
    letters, for delimiters.
    """
    first = text[: text.find("\n") + 1].strip("\r\n").strip('"')
    if len(first) == 5 and first.lower().startswith("sep=") and first[4] in DELIMITERS:
        return first[4], 1
    candidates: list[tuple[float, bool, int, str]] = []
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            rows = [row for row in islice(reader, _ROWS_LOOKED_AT) if any(map(str.strip, row))]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1:
            alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            candidates.append((alike, delimiter == usual, len(rows[0]), delimiter))
    return (max(candidates)[-1] if candidates else usual), 0


#: Most rows with damaged quotation marks that are read on behind.
_MOST_DAMAGED = 100


def delimited_rows(lines: Sequence[str], skipped: int, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, cells) of each row; of a damaged one, the reason in place of the cells.

    Behind a row whose quotation marks are damaged, reading goes on with the next line: a mark that is never closed would take
    all that follows for its cell.
    """
    begin, damaged = skipped, 0
    while begin < len(lines):
        rows = csv.reader(islice(lines, begin, None), delimiter=delimiter, strict=True)
        # `start` is the first line of a row; `line_num` is the last, since a row may span several lines
        start = begin
        try:
            for row in rows:
                yield start + 1, row
                start = begin + rows.line_num
            return
        except csv.Error as error:
            damaged += 1
            yield start + 1, str(error)
            if damaged == _MOST_DAMAGED:
                return
            begin = start + 1
