"""Rows of a table in a file (JSONL, JSON, CSV, TSV, Parquet), each with its place for messages.

The encoding of a text file is detected: UTF-8 where that is possible, UTF-16 and UTF-32, and the code pages of older programs.
It is decided by, in this order: a byte order mark; NUL bytes, which mean UTF-16; valid UTF-8, which other encodings hardly ever
are by chance; `charset_normalizer`, limited to common code pages.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
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
    """The rows of a file, and notes for the user on how it was read.

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

    Text may have any encoding, and the columns of CSV may be separated by commas, semicolons, tabs or bars; an unusual choice
    is logged as a warning, once for a file. Raises ArtefactError when it is missing, damaged, empty or of another kind.
    """
    table = read_table(path)
    if table.notes and (warning := (str(path.resolve()), *table.notes)) not in _LOGGED:
        _LOGGED.add(warning)
        _log.warning("note: %s: %s", path, "; ".join(table.notes))
    return table.records


#: Warnings that were logged, with their file: a command may read a file several times.
_LOGGED: set[tuple[str, ...]] = set()


def read_table(path: Path) -> RecordTable:
    """The rows of a file with notes on how it was read. Reads and raises as `read_records`."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise ArtefactError(f"{path}: {_why_no_table(path)}")
    notes: list[str] = []
    try:
        rows = list(reader(path, notes))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    records = [record for record in rows if not _is_blank(record.values)]
    blank_rows = len(rows) - len(records)
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


#: Advice for tables in formats that are not read.
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save the sheet as CSV, best as “CSV UTF-8”"),
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "decompress it first"),
}


def _is_blank(values: Mapping[str, Any]) -> bool:
    """Whether a row has no values, as the empty rows at the end of a spreadsheet."""
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in values.values())


def _text_of(path: Path, notes: list[str]) -> str:
    """A file's text. Notes an encoding other than UTF-8, and bytes that it cannot decode."""
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
    """Why a text cannot be read as JSON: its syntax, its depth, or a number of thousands of digits."""
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
    # the default limit, 131,072 characters a cell, is one of the whole process
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
    # `start` is the first line of a row; `line_num` is the last, since a row may span several lines
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
    """A value without the keys that are None: Parquet gives every row the keys of all rows."""
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


def json_lines(text: str) -> list[Any]:
    """The values of JSON lines, empty lines left out. Raises json.JSONDecodeError for a line that is none.

    A line ends at a line feed alone: `str.splitlines` also breaks at U+2028, U+2029 and U+0085, which JSON writes as they are.
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]


UTF8 = "utf-8"

#: Byte order marks, the longer first, since UTF-32's begins with UTF-16's; and codecs that skip the mark.
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Bytes that are examined for NUL bytes, and for the code page.
_HEAD, _MOST_LINES_BYTES = 4096, 1 << 16
#: Code pages of Windows and of East Asia, the commonest first: what Excel's "CSV" and Notepad's "ANSI" mean, by country.
_CODE_PAGES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "koi8_r", "mac_roman", "cp850", "cp874"),
)
#: Runs of characters beyond ASCII, Japanese kana, and the share of kana among them from which a text is Japanese.
_BEYOND_ASCII, _KANA, _KANA_SHARE = re.compile(r"[^\x00-\x7f\ufffd]+"), re.compile("[\u3041-\u30fe]"), 0.2
#: Differences in `charset_normalizer`'s chaos and coherence that are too small to choose a code page by.
_ALIKE = 0.01


def encoding_of(data: bytes, *, is_whole: bool = True) -> str:
    """The name of Python's codec for a text; `UTF8` also for one with a few damaged bytes.

    data: the text, or its beginning, which may end inside a character (`is_whole=False`).
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    if (wide := _utf16(data[:_HEAD])) is not None:
        return wide
    try:
        codecs.getincrementaldecoder(UTF8)().decode(data, final=is_whole)
    except UnicodeDecodeError:
        pass
    else:
        return UTF8
    decoded = data.decode(UTF8, "replace")
    whole = sum(map(len, _BEYOND_ASCII.findall(decoded)))
    damaged = decoded.count("\ufffd") - data.count("\ufffd".encode())
    return UTF8 if whole >= damaged else _code_page(data)


def decoded_text(data: bytes) -> tuple[str, str]:
    """A text without its byte order mark, and the codec that it was read with. Bytes that the codec does not know become
    U+FFFD."""
    name = encoding_of(data)
    return data.decode(name, "replace").removeprefix("\ufeff"), name


def undecodable_line(data: bytes, name: str) -> int | None:
    """The first line with bytes that a codec does not know; None where it knows all."""
    try:
        data.decode(name)
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    return None


def _utf16(head: bytes) -> str | None:
    """UTF-16 without a mark, by the NUL bytes that ASCII characters have in it on one side; None for anything else."""
    pairs = len(head) // 2
    if not pairs:
        return None
    first, second = head[0 : 2 * pairs : 2].count(0) / pairs, head[1 : 2 * pairs : 2].count(0) / pairs
    if max(first, second) < 0.7 or min(first, second) > 0.05:
        return None
    return "utf-16-le" if second > first else "utf-16-be"


def _code_page(data: bytes) -> str:
    """The code page of a text that is not Unicode, by its lines that are not ASCII.

    Of the code pages that fit about as well as the best one, the commonest is taken: a few words often fit both the Western and
    the Central European one.
    """
    from charset_normalizer import from_bytes

    lines = b"".join(_lines_beyond_ascii(data))
    for name in ("cp932", "euc_jp"):
        # the library takes a few Japanese words for Korean or Chinese
        characters = "".join(_BEYOND_ASCII.findall(lines.decode(name, "replace")))
        if len(_KANA.findall(characters)) > _KANA_SHARE * len(characters):
            return name
    matches = list(from_bytes(lines, cp_isolation=list(_CODE_PAGES), enable_fallback=False))
    if not matches:
        return _CODE_PAGES[0]
    best = min(matches, key=lambda match: (round(match.chaos, 2), -match.coherence))
    likely = {
        name
        for match in matches
        if match.chaos <= best.chaos + _ALIKE and match.coherence >= best.coherence - _ALIKE
        # code pages that decode the text alike are one match
        for name in (match.encoding, *match.could_be_from_charset)
    }
    return next(name for name in _CODE_PAGES if name in likely)


def _lines_beyond_ascii(data: bytes) -> Iterator[bytes]:
    size = 0
    for line in data.splitlines(keepends=True):
        if not line.isascii():
            yield line[:_MOST_LINES_BYTES]
            size += len(line)
            if size >= _MOST_LINES_BYTES:
                return
