"""Rows of a table in a file (JSONL, JSON, CSV, TSV, XLSX, Parquet, Arrow), plain or compressed, with their places.

What a file says otherwise than its name suggests is detected, and noted for the user: its encoding (`text_encoding.py`), the
delimiter of its columns, one object a line in a `.json`, a list in a `.jsonl`, a list under a key, columns as lists. A row that
cannot be read is kept apart with its reason, so that a caller may leave it out or stop.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bessemer.core.config import nearest
from bessemer.core.delimited import DELIMITERS, DELIMITERS_OF, delimited_rows, delimiter_of
from bessemer.core.errors import ArtefactError
from bessemer.core.json_rows import PART, json_values, rows_in
from bessemer.core.text_encoding import UTF8, decoded_text, undecodable_line
from bessemer.core.workbook import Cell, Workbook, WorkbookError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A row. number: its line in the file, or its row from 0. place: the file and the number, for messages."""

    values: Mapping[str, Any]
    number: int
    place: str

    def field(self, name: str) -> Any:
        """The value of a field. Raises ArtefactError when it is missing or empty."""
        value = self.values.get(name)
        if value is None:
            raise self.error(f"has no field {name!r}{nearest(name, list(self.values))}")
        return value

    def text(self, name: str) -> str:
        """A field that holds text or a number, as text. Raises ArtefactError for anything else."""
        value = self.field(name)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.error(f"the field {name!r} must be text, it is a {type(value).__name__}")
        return str(value)

    def texts(self, name: str) -> list[str]:
        """A field that holds texts, or one text. Raises ArtefactError for anything else."""
        value = self.field(name)
        if not isinstance(value, list):
            return [self.text(name)]
        if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in value):
            raise self.error(f"the field {name!r} must be a list of texts")
        return [str(each) for each in value]

    def error(self, message: str) -> ArtefactError:
        """An error about this row, to be raised."""
        return ArtefactError(f"{self.place}: {message}")


class BadRow(NamedTuple):
    """A row that cannot be used. number, place: as in `Record`. why: in one line, to stand behind the place."""

    number: int
    place: str
    why: str

    @property
    def error(self) -> ArtefactError:
        """An error about this row, to be raised."""
        return ArtefactError(f"{self.place}: {self.why}")


@dataclass(frozen=True)
class RecordTable:
    """The rows of a file, and notes for the user on how it was read.

    kind: the form of the file, in words. bad: rows that could not be read. blank_rows: how many rows without a value were left
    out.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    blank_rows: int = 0
    kind: str = ""
    bad: list[BadRow] = field(default_factory=list)


#: Endings of compressed files, which stand behind that of the table: `rows.jsonl.gz`.
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


def is_table(name: str) -> bool:
    """Whether `read_records` reads a file, by its name; `book.xlsx#Sheet2` names a part of one."""
    return _suffix(name) in _READERS or (PART in name and _suffix(name.rpartition(PART)[0]) in _READERS)


def is_text_file(name: str) -> bool:
    """Whether a file is one of text, by its name, plain or compressed."""
    return _suffix(name) in TEXTS


def split_part(path: Path) -> tuple[Path, str]:
    """A file, and the part of it that the path names behind `#`; no part where a file has that name."""
    name, mark, part = path.name.rpartition(PART)
    return (path.with_name(name), part) if mark and name and not path.exists() else (path, "")


def read_records(path: Path) -> list[Record]:
    """The rows of a file in one of the forms of `TABLES`, plain or compressed; rows without a value are left out.

    Text may have any encoding, and the columns of CSV may be separated by commas, semicolons, tabs or bars; an unusual choice
    is logged as a warning, once for a file. Raises ArtefactError when the file is missing, damaged, empty or of another kind,
    and for the first row that cannot be read.
    """
    table = read_table(path)
    if table.bad:
        raise table.bad[0].error
    if table.notes and (warning := (str(path.resolve()), *table.notes)) not in _LOGGED:
        _LOGGED.add(warning)
        _log.warning("note: %s: %s", path, "; ".join(table.notes))
    return table.records


#: Warnings that were logged, with their file: a command may read a file several times.
_LOGGED: set[tuple[str, ...]] = set()


def read_table(path: Path) -> RecordTable:
    """The rows of a file, the rows that cannot be read, and notes on how it was read. Raises as `read_records`."""
    file, part = split_part(path)
    suffix = _suffix(file.name)
    reader = _READERS.get(suffix)
    if reader is None or file.is_dir():
        raise ArtefactError(f"{path}: {_why_no_table(file)}")
    if part and suffix not in _WITH_PARTS:
        raise ArtefactError(f"{path}: {PART} names a sheet of a workbook or a key of JSON, and {suffix} has neither")
    reading = _Reading(file, part)
    try:
        rows = list(reader.read(reading))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    records = [row for row in rows if isinstance(row, Record) and not _is_blank(row.values)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    blank_rows = len(rows) - len(records) - len(bad)
    if blank_rows:
        reading.notes.append(f"{blank_rows:,} blank {'row' if blank_rows == 1 else 'rows'} left out")
    if not records and not bad:
        raise ArtefactError(
            f"{path}: holds no rows; give a file with a row for each example, below a header where it is a .csv or .xlsx"
        )
    return RecordTable(records, reading.notes, blank_rows, reader.kind, bad)


class _Reading:
    """A file that is being read: its bytes, the part that is meant, and notes for the user."""

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part = part
        self.notes: list[str] = []

    def data(self) -> bytes:
        """The file's bytes, decompressed. Raises ArtefactError as `read_bytes`."""
        return read_bytes(self.path)

    def text(self) -> str:
        """The file's text. Notes an encoding other than UTF-8, and bytes that it cannot decode."""
        data = self.data()
        text, encoding = decoded_text(data)
        if encoding != UTF8:
            self.notes.append(f"read as {encoding}")
        if (line := undecodable_line(data, encoding)) is not None:
            self.notes.append(f"bytes that {encoding} does not know were replaced, the first in line {line:,}")
        return text

    def line(self, number: int) -> str:
        """The place of a line, from 1."""
        return f"{self.path}:{number}"

    def row(self, number: int) -> str:
        """The place of a row, from 0."""
        return f"{self.path}, row {number}"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed where its name ends in one of `COMPRESSIONS`. Raises ArtefactError for one that is
    missing or damaged."""
    compression = path.suffix.lower()
    try:
        data = path.read_bytes()
        match compression:
            case ".gz":
                return gzip.decompress(data)
            case ".bz2":
                return bz2.decompress(data)
            case ".xz":
                return lzma.decompress(data)
            case ".zst":
                return _zstandard(data)
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        if compression not in COMPRESSIONS:
            raise
        raise ArtefactError(f"{path}: is damaged, cut off, or no {compression} ({error}); fetch it again") from None
    return data


def _zstandard(data: bytes) -> bytes:
    """Decompressed frames, one behind the other. By pyarrow, which tables of other forms need as well."""
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


def _suffix(name: str) -> str:
    """The ending of a file's name without that of a compression, in small letters."""
    path = PurePath(name)
    return PurePath(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def _why_no_table(path: Path) -> str:
    wanted = f"a table is {', '.join(_READERS)}, each also with {', '.join(COMPRESSIONS)}"
    if path.is_dir():
        return f"{wanted}, and this is a folder; name a file"
    remedy = _REMEDIES.get(path.suffix.lower())
    return f"{wanted}, not {path.suffix or 'a file without a suffix'}{f'; {remedy}' if remedy else ''}"


#: Advice for tables in formats that are not read.
_REMEDIES = {
    **dict.fromkeys((".xls", ".ods", ".numbers"), "save the sheet as .xlsx, or as CSV, best as “CSV UTF-8”"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, and name the table in it"),
    **dict.fromkeys((".pkl", ".pickle", ".pt"), "it may run code and is not opened; where it was made, save it as .parquet"),
    **dict.fromkeys(COMPRESSIONS, "its name lacks that of the table in it, as in rows.jsonl.gz"),
}


def _is_blank(values: Mapping[str, Any]) -> bool:
    """Whether a row has no values, as the empty rows at the end of a spreadsheet."""
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in values.values())


_Rows = Iterator[Record | BadRow]


def _read_jsonl(reading: _Reading) -> _Rows:
    return _json_lines(reading, reading.text())


def _json_lines(reading: _Reading, text: str) -> _Rows:
    """A row a line. A list of objects in such a file, and objects over several lines, are read too."""
    start = text.lstrip()[:2]
    # only one that spans lines is not read line by line
    if start[:1] == "[" or start.strip() == "{":
        try:
            values = json_values(text)
        except ValueError:
            pass
        else:
            rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
            if any(isinstance(one, dict) for one in rows):
                reading.notes.append("a list of objects, not one a line" if rows is values[0] else "objects over several lines")
                yield from _json_records(reading, rows)
                return
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        place = reading.line(number)
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(number, place, _why_no_json(error))
            continue
        if isinstance(values, dict):
            yield Record(values, number, place)
        else:
            yield BadRow(number, place, f"must be an object, it is a {type(values).__name__}")


def _why_no_json(error: Exception) -> str:
    """Why a text cannot be read as JSON: its syntax, its depth, or a number of thousands of digits."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"is not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})"


def _read_json(reading: _Reading) -> _Rows:
    text = reading.text()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        is_many = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if is_many and not reading.part:
            reading.notes.append("one object a line, as .jsonl has it")
            yield from _json_lines(reading, text)
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ArtefactError(f"{reading.path}{line}: {_why_no_json(error)}") from None
    try:
        rows = rows_in(value, reading.part, reading.path.name, reading.notes)
    except ValueError as error:
        raise ArtefactError(f"{reading.path}: {error}") from None
    yield from _json_records(reading, rows)


def _json_records(reading: _Reading, rows: Sequence[Any]) -> _Rows:
    for number, values in enumerate(rows):
        if isinstance(values, dict):
            yield Record(values, number, reading.row(number))
        else:
            yield BadRow(number, reading.row(number), f"must be an object, it is a {type(values).__name__}")


def _read_csv(reading: _Reading) -> _Rows:
    # the default limit, 131,072 characters a cell, is one of the whole process
    csv.field_size_limit(2**31 - 1)
    text = reading.text()
    usual = DELIMITERS_OF.get(_suffix(reading.path.name), ",")
    delimiter, skipped = delimiter_of(text, usual)
    if delimiter != usual:
        reading.notes.append(f"columns separated by {DELIMITERS[delimiter]}")
    lines = list(io.StringIO(text, newline=""))
    header: list[str] = []
    for start, row in delimited_rows(lines, skipped, delimiter):
        place = reading.line(start)
        if isinstance(row, str):
            if not header:
                raise ArtefactError(f"{place}: is not CSV ({row})")
            yield BadRow(start, place, f"is not CSV ({row})")
        elif not header:
            header = row if any(map(str.strip, row)) else []
            twice = next((name for place, name in enumerate(header) if name.strip() and name in header[:place]), None)
            if twice is not None:
                raise ArtefactError(f"{place}: has two columns {twice!r}")
        elif row:
            beyond = next(filter(str.strip, row[len(header) :]), None)
            if beyond is not None:
                yield BadRow(
                    start,
                    place,
                    f"has more cells than the header, the first with {beyond[:40]!r}; a cell that holds {delimiter!r} must "
                    "stand in quotation marks",
                )
                continue
            cells = [*row, *[None] * (len(header) - len(row))]
            # a column without a name is a spreadsheet's empty one, or an index
            values = {name: cell for name, cell in zip(header, cells, strict=False) if name.strip()}
            yield Record(values, start, place)


def _read_workbook(reading: _Reading) -> _Rows:
    """The rows of the sheet that is meant, or the first visible one with rows. A title above the header is read over."""
    try:
        book = Workbook(io.BytesIO(reading.data()))
        known = [sheet.name for sheet in book.sheets]
        if reading.part and reading.part not in known:
            raise ArtefactError(f"{reading.path}: has no sheet {reading.part!r}{nearest(reading.part, known)}")
        asked = [one for one in book.sheets if one.name == reading.part or not (reading.part or one.is_hidden)]
        for sheet in asked:
            rows = [(number, cells) for number, cells in book.rows(sheet) if any(map(_is_filled, cells))]
            if rows:
                break
        else:
            return
    except WorkbookError as error:
        raise ArtefactError(f"{reading.path}: {error}") from None
    others = [one for one in known if one != sheet.name]
    if others and not reading.part:
        reading.notes.append(
            f"the sheet {sheet.name!r}, not {', '.join(map(repr, others))} ({PART}SHEET behind the file names one)"
        )
    head = rows[:_ROWS_BELOW_A_TITLE]
    # a title is a single cell above rows of several
    first = next((place for place, (_, cells) in enumerate(head) if sum(map(_is_filled, cells)) > 1), 0)
    if first:
        reading.notes.append(f"the header is in row {rows[first][0]:,}, below a title")
    header = [str(cell).strip() if _is_filled(cell) else "" for cell in rows[first][1]]
    twice = next((name for place, name in enumerate(header) if name and name in header[:place]), None)
    if twice is not None:
        raise ArtefactError(f"{reading.path}, row {rows[first][0]}: has two columns {twice!r}")
    for number, cells in rows[first + 1 :]:
        padded = [*cells, *[None] * (len(header) - len(cells))]
        values = {name: cell for name, cell in zip(header, padded, strict=False) if name}
        yield Record(values, number, f"{reading.path}, row {number}")


#: Rows among which the header of a sheet is looked for.
_ROWS_BELOW_A_TITLE = 10


def _is_filled(cell: Cell) -> bool:
    return cell is not None and (not isinstance(cell, str) or bool(cell.strip()))


def _read_parquet(reading: _Reading) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    is_compressed = reading.path.suffix.lower() in COMPRESSIONS
    try:
        source = pyarrow.BufferReader(reading.data()) if is_compressed else reading.path
        rows = pyarrow.parquet.read_table(source).to_pylist()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtefactError(f"{reading.path}: is not Parquet, or damaged ({error})") from None
    return _without_absents(rows, reading)


def _read_arrow(reading: _Reading) -> _Rows:
    """A stream or a file of Arrow, as `datasets` keeps them."""
    import pyarrow

    data = reading.data()
    opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    try:
        rows = opened(data).read_all().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtefactError(f"{reading.path}: is not Arrow, or damaged ({error})") from None
    return _without_absents(rows, reading)


def _without_absents(rows: Sequence[Mapping[str, Any]], reading: _Reading) -> _Rows:
    for number, row in enumerate(rows):
        yield Record({name: _without_absent(value) for name, value in row.items()}, number, reading.row(number))


def _without_absent(value: Any) -> Any:
    """A value without the keys that are None: Parquet gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {name: _without_absent(item) for name, item in value.items() if item is not None}
    return [_without_absent(item) for item in value] if isinstance(value, list) else value


class _Reader(NamedTuple):
    """How files of a form are read. kind: the form in words."""

    kind: str
    read: Callable[[_Reading], _Rows]


_READERS: dict[str, _Reader] = {
    ".jsonl": _Reader("JSON lines", _read_jsonl),
    ".ndjson": _Reader("JSON lines", _read_jsonl),
    ".json": _Reader("JSON", _read_json),
    ".csv": _Reader("CSV", _read_csv),
    ".tsv": _Reader("TSV", _read_csv),
    ".xlsx": _Reader("an Excel workbook", _read_workbook),
    ".xlsm": _Reader("an Excel workbook", _read_workbook),
    ".parquet": _Reader("Parquet", _read_parquet),
    ".arrow": _Reader("Arrow", _read_arrow),
}
#: Forms of which a part may be named: a sheet, a key.
_WITH_PARTS = frozenset({".json", ".xlsx", ".xlsm"})

#: Endings of files of text.
TEXTS = (".txt", ".text", ".md", ".markdown", ".mdx", ".rst")
#: Endings of the files that `read_records` reads.
TABLES = tuple(_READERS)


def json_lines(text: str) -> list[Any]:
    """The values of JSON lines, empty lines left out. Raises json.JSONDecodeError for a line that is none.

    A line ends at a line feed alone: `str.splitlines` also breaks at U+2028, U+2029 and U+0085, which JSON writes as they are.
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]
