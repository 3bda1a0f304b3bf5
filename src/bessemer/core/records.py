"""The rows of a table in a file, each with its place for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError


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


def read_records(path: Path) -> list[Record]:
    """The rows of a JSONL, JSON (a list of objects), CSV or Parquet file.

    Raises ArtefactError when it is missing, damaged, empty or of another kind.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ArtefactError(f"{path}: a table is {', '.join(_READERS)}, not {path.suffix or 'a file without a suffix'}")
    try:
        records = list(reader(path))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise ArtefactError(f"{path}:{_undecodable_line(path)}: is not UTF-8 text; save the file as UTF-8") from None
    if not records:
        raise ArtefactError(
            f"{path}: holds no rows; give a file with a row for each example, below a header where it is a .csv"
        )
    return records


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError(path)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
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


def _read_json(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ArtefactError(f"{path}{line}: {_why_no_json(error)}") from None
    if not isinstance(rows, list):
        raise ArtefactError(f"{path}: must be a list of objects, it is a {type(rows).__name__}; one object a line is .jsonl")
    for number, values in enumerate(rows):
        if not isinstance(values, dict):
            raise ArtefactError(f"{path}, row {number}: must be an object, it is a {type(values).__name__}")
        yield Record(values, number, f"{path}, row {number}")


def _read_csv(path: Path) -> Iterator[Record]:
    # by default a cell ends at 131,072 characters, which is a setting of the whole process
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        header = rows.fieldnames or ()
        other = next((name for sign, name in _OTHER_SEPARATORS.items() if len(header) == 1 and sign in header[0]), None)
        if other is not None:
            raise ArtefactError(f"{path}:1: its columns are separated by {other}, and a .csv's by commas; save it with commas")
        twice = next((name for place, name in enumerate(header) if name in header[:place]), None)
        if twice is not None:
            raise ArtefactError(f"{path}:1: has two columns {twice!r}")
        # a row ends at `line_num`, and may span several lines
        start = 2
        try:
            for row in rows:
                if None in row:
                    raise ArtefactError(f"{path}:{start}: has more cells than the header")
                yield Record(row, start, f"{path}:{start}")
                start = rows.line_num + 1
        except csv.Error as error:
            raise ArtefactError(f"{path}:{start}: is not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Record]:
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


#: What separates the columns of tables that are not CSV.
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}

_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

#: Endings of the files that `read_records` reads.
TABLES = tuple(_READERS)
