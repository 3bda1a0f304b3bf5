"""Source `tables`: Parquet, CSV and JSON lines with named columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.delimited import DELIMITERS, DELIMITERS_OF, delimiter_of
from bessemer.core.errors import SourceError
from bessemer.core.object_storage import RANDOM_ACCESS_BYTES
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import (
    SettingsFormat,
    bounded_lines,
    decoded,
    json_lines,
    note_end,
    record_document,
)
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.registry import ColumnsConfig, TablesSource
from bessemer.data.sources.source import OTHER_DELIMITER, Document, PositionedDocument, Tally

_ROWS = 256
_NAMED = ("text", "id", "url", "license", "language")
_PARQUET, _DELIMITED, _LINES = (".parquet", ".pq"), (".csv", ".tsv"), (".jsonl", ".ndjson")


# Columns of the documents' own names (`url`, `license`, …) count where they exist and no other is named; `metadata` None keeps
# every other plain column.


def record_of_row(columns: ColumnsConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the documents' names for its columns."""
    named = {name: getattr(columns, name) for name in _NAMED}
    taken = {column for column in named.values() if column}
    record = {ours: row.get(column or ours) for ours, column in named.items() if (column or ours) in row}
    others = row.keys() - taken - record.keys()
    kept = others if columns.metadata is None else others.intersection(columns.metadata)
    return record | {"metadata": {name: row[name] for name in sorted(kept)}}


def _needed(columns: ColumnsConfig, present: list[str]) -> list[str]:
    """The columns to read of those that a file has."""
    kept = present if columns.metadata is None else [*(getattr(columns, name) or name for name in _NAMED), *columns.metadata]
    return [name for name in present if name in kept]


@dataclass(frozen=True)
class Tables(SettingsFormat):
    """One document a row."""

    settings: TablesSource
    known: ClassVar[str] = ".parquet/.csv/.tsv/.jsonl; the last three also compressed, all in archives"

    def reads(self, name: str) -> bool:
        return name.lower().endswith((*_PARQUET, *_DELIMITED, *_LINES))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        name = entry.name.lower()
        if name.endswith(_PARQUET):
            rows = self._parquet_rows(entry, start, tally)
        elif name.endswith(_DELIMITED):
            rows = self._delimited_rows(entry, start, DELIMITERS_OF[name[-4:]], tally)
        else:
            rows = json_lines(entry, start, tally, self.settings.max_document_bytes)
        for position, row, place in rows:
            if (document := self._document(row, place, entry, tally)) is not None:
                yield position, document

    def _document(self, row: Mapping[str, Any], place: str, entry: Entry, tally: Tally) -> Document | None:
        text = row.get(self.settings.columns.text)
        if text is None or (isinstance(text, str) and not text.strip()):
            tally.counts["rows_without_text"] += 1
            return None
        if isinstance(text, str) and len(text) > self.settings.max_document_bytes:
            tally.set_aside("too_large", place, f"a text of {len(text):,} characters")
            return None
        try:
            return record_document(record_of_row(self.settings.columns, row), place, default_license=entry.license)
        except SourceError as error:
            tally.set_aside("bad_records", place, str(error).removeprefix(f"{place}: "))
            return None

    def _parquet_rows(self, entry: Entry, start: int, tally: Tally) -> Iterator[tuple[int, dict[str, Any], str]]:
        """Rows, row group after row group. The text is kept as a dictionary where the file has one, so that a long text
        that stands in every row is held once."""
        row = 0
        text = self.settings.columns.text
        try:
            source = self._parquet_file(entry, tally)
            if source is None:
                return
            with source, ExitStack() as opened:
                present = pq.read_schema(source).names
                if text not in present:
                    tally.set_aside("bad_records", entry.place, f"no column {text!r}; it has {', '.join(present[:20])}")
                    return
                file = opened.enter_context(pq.ParquetFile(source, read_dictionary=[text], page_checksum_verification=True))
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if row + count <= start:
                        row += count
                        continue
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=_needed(self.settings.columns, present)):
                        lengths = _lengths(batch.column(text))
                        for index in range(batch.num_rows):
                            row += 1
                            place = f"{entry.place}: row {row:,}"
                            if row > start and lengths[index] > self.settings.max_document_bytes:
                                tally.set_aside("too_large", place, f"a text of {lengths[index]:,} bytes")
                            elif row > start:
                                yield row, {name: batch.column(name)[index].as_py() for name in batch.schema.names}, place
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            tally.set_aside("damaged_files", entry.place, f"read to row {row:,}: {error}")

    def _parquet_file(self, entry: Entry, tally: Tally) -> Any:
        """The file to read in places; one that is compressed or in an archive is held whole. None when it is set aside."""
        if entry.is_compressed or entry.path is None:
            data = entry.content(self.settings.max_file_bytes, tally)
            return None if data is None else pa.BufferReader(data)
        return pa.OSFile(str(entry.path)) if isinstance(entry.path, Path) else entry.path.open(ahead=RANDOM_ACCESS_BYTES)

    def _delimited_rows(self, entry: Entry, start: int, usual: str, tally: Tally) -> Iterator[tuple[int, dict[str, Any], str]]:
        csv.field_size_limit(max(csv.field_size_limit(), self.settings.max_document_bytes + 1))
        with entry.open_text(tally=tally if start == 0 else None) as stream:
            sample = decoded(stream.peek(), Tally()).removeprefix("\ufeff")
            delimiter, above = delimiter_of(sample, usual)
            lines = _Lines(stream, self.settings.max_document_bytes, entry, tally)
            header = next(csv.reader(islice(lines, above, None), delimiter=delimiter), None)
            if header is None:
                note_end(entry, stream.damage, stream.given, tally)
                return
            header[0] = header[0].removeprefix("\ufeff")
            if delimiter != usual and start == 0:
                tally.set_aside(OTHER_DELIMITER, entry.place, f"its columns are separated by {DELIMITERS[delimiter]}")
            if self.settings.columns.text not in header:
                why = f"no column {self.settings.columns.text!r}; it has {', '.join(header[:20])}"
                tally.set_aside("bad_records", entry.place, why)
                return
            if start <= lines.end:
                # goes on with the open stream: members of a compressed tar can be read once
                yield from _rows_below(header, lines, delimiter, stream, entry, tally)
                return
        with entry.open_text(start) as stream:
            lines = _Lines(stream, self.settings.max_document_bytes, entry, tally)
            yield from _rows_below(header, lines, delimiter, stream, entry, tally)


def _rows_below(
    header: list[str], lines: _Lines, delimiter: str, stream: Stream, entry: Entry, tally: Tally
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The rows of a table below its header, each with the byte behind it and its place."""
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        begin = lines.end
        place = f"{entry.place}: byte {begin:,}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            tally.set_aside("bad_records", place, str(error))
            reader = csv.reader(lines, delimiter=delimiter)
            continue
        if row is None:
            break
        if not any(map(str.strip, row)):
            if row:
                tally.counts["blank_rows"] += 1
        elif len(row) >= len(header) and not any(map(str.strip, row[len(header) :])):
            yield lines.end, dict(zip(header, row, strict=False)), place
        else:
            tally.set_aside("bad_records", place, f"{len(row)} fields instead of {len(header)}")
    note_end(entry, stream.damage, stream.tell(), tally)


open_tables = Tables.open


def _lengths(texts: pa.Array) -> list[int]:
    """The bytes of each text, 0 for what is none; of a dictionary each text is measured once."""
    if isinstance(texts, pa.DictionaryArray):
        sizes = _lengths(texts.dictionary)
        return [0 if index is None else sizes[index] for index in texts.indices.to_pylist()]
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_binary(texts.type)):
        return [0] * len(texts)
    return pc.fill_null(pc.binary_length(texts), 0).to_pylist()  # type: ignore[no-any-return]


class _Lines:
    """The lines of a table as text, and how far they were read. Lines too long to hold are set aside."""

    def __init__(self, stream: Stream, limit: int, entry: Entry, tally: Tally) -> None:
        self.end = stream.tell()
        self._lines = bounded_lines(stream, limit)
        self._entry = entry
        self._tally = tally

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while True:
            begin, self.end, line = next(self._lines)
            if line is not None:
                return decoded(line, self._tally).replace("\0", "")
            self._tally.set_aside("too_large", f"{self._entry.place}: byte {begin:,}", "a line too long to hold")
