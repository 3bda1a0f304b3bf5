"""The rows of a table in a file, each with its place for messages."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.encodings import UTF8, decoded_text, undecodable_line
from bessemer.core.errors import ArtefactError

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


@dataclass(frozen=True)
class RecordTable:
    """The rows of a file, and what a user should know of how it was read, in words.

    blank_rows: how many rows without a value were left out.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    blank_rows: int = 0


def is_table(name: str) -> bool:
    """Whether `read_records` reads a file, by its name."""
    return name.lower().endswith(TABLES)


def read_records(path: Path) -> list[Record]:
    """The rows of a JSONL, JSON (a list of objects), CSV, TSV or Parquet file; rows without a value are left out.

    Text may have any encoding, and the columns of CSV be separated by commas, semicolons, tabs or bars: what is found is logged
    as a warning, once for a file. Raises ArtefactError when it is missing, damaged, empty or of another kind.
    """
    table = read_table(path)
    if table.notes and (said := (str(path.resolve()), *table.notes)) not in _SAID:
        _SAID.add(said)
        _log.warning("note: %s: %s", path, "; ".join(table.notes))
    return table.records


#: What was logged of which file: a command reads some files several times.
_SAID: set[tuple[str, ...]] = set()


def read_table(path: Path) -> RecordTable:
    """The rows of a file with notes on how it was read. Reads and raises as `read_records`."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise ArtefactError(f"{path}: {_why_no_table(path)}")
    notes: list[str] = []
    try:
        found = list(reader(path, notes))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    records = [record for record in found if not _is_blank(record.values)]
    blank_rows = len(found) - len(records)
    if blank_rows:
        notes.append(f"{blank_rows:,} blank {'row' if blank_rows == 1 else 'rows'} left out")
    if not records:
        raise ArtefactError(
            f"{path}: holds no rows; give a file with a row for each example, below a header where it is a .csv"
        )
    return RecordTable(records, notes, blank_rows)


def _why_no_table(path: Path) -> str:
    wanted = f"a table is {', '.join(_READERS)}"
    if path.is_dir():
        return f"{wanted}, and this is a folder; name a file"
    remedy = _REMEDIES.get(path.suffix.lower())
    return f"{wanted}, not {path.suffix or 'a file without a suffix'}{f'; {remedy}' if remedy else ''}"


#: What to do with files that hold tables in a form that is not read here.
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save the sheet as CSV, best as “CSV UTF-8”"),
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "decompress it first"),
}


def _is_blank(values: Mapping[str, Any]) -> bool:
    """Whether a row holds nothing, as the rows do below the last one that was filled in."""
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in values.values())


def _text_of(path: Path, notes: list[str]) -> str:
    """A file's text. Notes the encoding where it is not UTF-8, and bytes that it does not know."""
    data = path.read_bytes()
    text, encoding = decoded_text(data)
    if encoding != UTF8:
        notes.append(f"read as {encoding}")
    if (line := undecodable_line(data, encoding)) is not None:
        notes.append(f"bytes that {encoding} does not know were replaced, the first in line {line:,}")
    return text


def _read_jsonl(path: Path, notes: list[str]) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(_text_of(path, notes)), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{path}:{number}: {_why_no_json(error)}") from None
        if not isinstance(values, dict):
            raise ArtefactError(f"{path}:{number}: must be an object, it is a {type(values).__name__}")
        yield Record(values, number, f"{path}:{number}")


def _why_no_json(error: Exception) -> str:
    """What keeps a text from being read as JSON: not its grammar alone, but also a number of thousands of digits."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"is not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})"


def _read_json(path: Path, notes: list[str]) -> Iterator[Record]:
    text = _text_of(path, notes)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ArtefactError(f"{path}{line}: {_why_no_json(error)}") from None
    if not isinstance(rows, list):
        lists = [name for name, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        remedy = f"keep the list under {' or '.join(map(repr, lists))} alone" if lists else "one object a line is .jsonl"
        raise ArtefactError(f"{path}: must be a list of objects, it is a {type(rows).__name__}; {remedy}")
    for number, values in enumerate(rows):
        if not isinstance(values, dict):
            raise ArtefactError(f"{path}, row {number}: must be an object, it is a {type(values).__name__}")
        yield Record(values, number, f"{path}, row {number}")


def _read_csv(path: Path, notes: list[str]) -> Iterator[Record]:
    # by default a cell ends at 131,072 characters, which is a setting of the whole process
    csv.field_size_limit(2**31 - 1)
    text = _text_of(path, notes)
    usual = DELIMITERS_OF.get(path.suffix.lower(), ",")
    delimiter, skipped = delimiter_of(text, usual)
    if delimiter != usual:
        notes.append(f"columns separated by {DELIMITERS[delimiter]}")
    stream = io.StringIO(text, newline="")
    for _ in range(skipped):
        next(stream)
    rows = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] = []
    # a row ends at `line_num`, and may span several lines
    start = 1 + skipped
    try:
        for row in rows:
            if not header:
                header = row if any(map(str.strip, row)) else []
                twice = next((name for place, name in enumerate(header) if name.strip() and name in header[:place]), None)
                if twice is not None:
                    raise ArtefactError(f"{path}:{start}: has two columns {twice!r}")
            elif row:
                beyond = next(filter(str.strip, row[len(header) :]), None)
                if beyond is not None:
                    raise ArtefactError(
                        f"{path}:{start}: has more cells than the header, the first with {beyond[:40]!r}; a cell that holds "
                        f"{delimiter!r} must stand in quotation marks"
                    )
                cells = [*row, *[None] * (len(header) - len(row))]
                # a column without a name is a spreadsheet's empty one, or an index
                values = {name: cell for name, cell in zip(header, cells, strict=False) if name.strip()}
                yield Record(values, start, f"{path}:{start}")
            start = rows.line_num + 1 + skipped
    except csv.Error as error:
        raise ArtefactError(f"{path}:{start}: is not CSV ({error})") from None


#: What may separate the columns of a table, in words.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
#: Suffix → what separates the columns by it, where nothing tells otherwise.
DELIMITERS_OF = {".csv": ",", ".tsv": "\t"}
#: How many rows tell what separates the columns.
_ROWS_LOOKED_AT = 200


def delimiter_of(text: str, usual: str) -> tuple[str, int]:
    """What separates the columns of a table, and how many lines before the header say so (Excel's `sep=;`).

    The sign by which the most rows have as many cells as the header, which has at least two; of equals the usual one, then the
    one that makes the most columns. `csv.Sniffer` looks at counts of characters instead, and takes commas inside German
    numbers, or letters, for delimiters.
    """
    first = text[: text.find("\n") + 1].strip("\r\n").strip('"')
    if len(first) == 5 and first.lower().startswith("sep=") and first[4] in DELIMITERS:
        return first[4], 1
    found: list[tuple[float, bool, int, str]] = []
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            rows = [row for row in islice(reader, _ROWS_LOOKED_AT) if any(map(str.strip, row))]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1:
            alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            found.append((alike, delimiter == usual, len(rows[0]), delimiter))
    return (max(found)[-1] if found else usual), 0


def _read_parquet(path: Path, notes: list[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtefactError(f"{path}: is not Parquet, or damaged ({error})") from None
    for number, row in enumerate(rows):
        yield Record({name: _without_absent(value) for name, value in row.items()}, number, f"{path}, row {number}")


def _without_absent(value: Any) -> Any:
    """A value without the keys that its struct has because another row has them: Parquet holds them as None."""
    if isinstance(value, dict):
        return {name: _without_absent(item) for name, item in value.items() if item is not None}
    return [_without_absent(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}

#: Endings of the files that `read_records` reads.
TABLES = tuple(_READERS)
