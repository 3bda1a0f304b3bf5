"""Sources `tables` (Parquet, CSV and JSON lines with named columns) and `hugging_face` (data sets of the Hub, or in folders).

The package `datasets` reads the Hub's: streamed over the network, or from a folder as the Hub or `save_to_disk` wrote it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.environment import install_extra
from bessemer.core.errors import SourceError
from bessemer.core.object_storage import RANDOM_ACCESS_BYTES
from bessemer.core.progress import Progress
from bessemer.core.records import DELIMITERS, DELIMITERS_OF, delimiter_of
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.fetch import Clock, growing_wait, tried_again
from bessemer.data.sources.io.file_source import (
    FileSource,
    bounded_lines,
    decoded,
    file_source,
    json_lines,
    note_end,
    record_document,
)
from bessemer.data.sources.io.paths import ContentFingerprints
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.registry import ColumnsConfig, HuggingFaceSource, TablesSource
from bessemer.data.sources.source import OTHER_DELIMITER, Document, PositionedDocument, Tally, Unit

_ROWS = 256
_PARQUET, _DELIMITED, _LINES = (".parquet", ".pq"), (".csv", ".tsv"), (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. Those of the documents' own names (`url`, `license`, …) count where they exist and no
    other is named; `metadata` None keeps every other plain column."""

    text: str = "text"
    id: str | None = None
    url: str | None = None
    license: str | None = None
    language: str | None = None
    metadata: tuple[str, ...] | None = None

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the documents' names for its columns."""
        named = {"text": self.text, "id": self.id, "url": self.url, "license": self.license, "language": self.language}
        taken = {column for column in named.values() if column}
        record = {ours: row.get(column or ours) for ours, column in named.items() if (column or ours) in row}
        others = row.keys() - taken - record.keys()
        kept = others if self.metadata is None else others.intersection(self.metadata)
        return record | {"metadata": {name: row[name] for name in sorted(kept)}}

    def needed(self, present: list[str]) -> list[str]:
        """The columns to read of those that a file has."""
        named = [self.text, self.id or "id", self.url or "url", self.license or "license", self.language or "language"]
        kept = present if self.metadata is None else [*named, *self.metadata]
        return [name for name in present if name in kept]


def columns_of(settings: ColumnsConfig) -> Columns:
    """The columns that the settings name."""
    return Columns(
        settings.text,
        settings.id,
        settings.url,
        settings.license,
        settings.language,
        None if settings.metadata is None else tuple(settings.metadata),
    )


@dataclass(frozen=True)
class Tables:
    """One document a row."""

    max_file_bytes: int
    max_document_bytes: int
    columns: Columns = field(default_factory=Columns)
    known: str = ".parquet/.csv/.tsv/.jsonl; the last three also compressed, all in archives"
    small: bool = False
    archives: tuple[str, ...] = field(default=ARCHIVES)

    def reads(self, name: str) -> bool:
        return name.lower().endswith((*_PARQUET, *_DELIMITED, *_LINES))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        name = entry.name.lower()
        if name.endswith(_PARQUET):
            rows = self._parquet_rows(entry, start, tally)
        elif name.endswith(_DELIMITED):
            rows = self._delimited_rows(entry, start, DELIMITERS_OF[name[-4:]], tally)
        else:
            rows = json_lines(entry, start, tally, self.max_document_bytes)
        for position, row, place in rows:
            if (document := self._document(row, place, entry, tally)) is not None:
                yield position, document

    def _document(self, row: Mapping[str, Any], place: str, entry: Entry, tally: Tally) -> Document | None:
        text = row.get(self.columns.text)
        if text is None or (isinstance(text, str) and not text.strip()):
            tally.counts["rows_without_text"] += 1
            return None
        if isinstance(text, str) and len(text) > self.max_document_bytes:
            tally.set_aside("too_large", place, f"a text of {len(text):,} characters")
            return None
        try:
            return record_document(self.columns.record(row), place, default_license=entry.license)
        except SourceError as error:
            tally.set_aside("bad_records", place, str(error).removeprefix(f"{place}: "))
            return None

    def _parquet_rows(self, entry: Entry, start: int, tally: Tally) -> Iterator[tuple[int, dict[str, Any], str]]:
        """Rows, row group after row group. The text is kept as a dictionary where the file has one, so that a long text
        that stands in every row is held once."""
        row = 0
        text = self.columns.text
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
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=self.columns.needed(present)):
                        lengths = _lengths(batch.column(text))
                        for index in range(batch.num_rows):
                            row += 1
                            place = f"{entry.place}: row {row:,}"
                            if row > start and lengths[index] > self.max_document_bytes:
                                tally.set_aside("too_large", place, f"a text of {lengths[index]:,} bytes")
                            elif row > start:
                                yield row, {name: batch.column(name)[index].as_py() for name in batch.schema.names}, place
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            tally.set_aside("damaged_files", entry.place, f"read to row {row:,}: {error}")

    def _parquet_file(self, entry: Entry, tally: Tally) -> Any:
        """The file to read in places; one that is compressed or in an archive is held whole. None when it is set aside."""
        if entry.is_compressed or entry.path is None:
            data = entry.content(self.max_file_bytes, tally)
            return None if data is None else pa.BufferReader(data)
        return pa.OSFile(str(entry.path)) if isinstance(entry.path, Path) else entry.path.open(ahead=RANDOM_ACCESS_BYTES)

    def _delimited_rows(self, entry: Entry, start: int, usual: str, tally: Tally) -> Iterator[tuple[int, dict[str, Any], str]]:
        csv.field_size_limit(max(csv.field_size_limit(), self.max_document_bytes + 1))
        with entry.open_text(tally=tally if start == 0 else None) as stream:
            sample = decoded(stream.peek(), Tally()).removeprefix("\ufeff")
            delimiter, above = delimiter_of(sample, usual)
            lines = _Lines(stream, self.max_document_bytes, entry, tally)
            header = next(csv.reader(islice(lines, above, None), delimiter=delimiter), None)
            if header is None:
                note_end(entry, stream.damage, stream.given, tally)
                return
            header[0] = header[0].removeprefix("\ufeff")
            if delimiter != usual and start == 0:
                tally.set_aside(OTHER_DELIMITER, entry.place, f"its columns are separated by {DELIMITERS[delimiter]}")
            if self.columns.text not in header:
                why = f"no column {self.columns.text!r}; it has {', '.join(header[:20])}"
                tally.set_aside("bad_records", entry.place, why)
                return
            if start <= lines.end:
                # not opened again: what is in a compressed tar is read once
                yield from _rows_below(header, lines, delimiter, stream, entry, tally)
                return
        with entry.open_text(start) as stream:
            lines = _Lines(stream, self.max_document_bytes, entry, tally)
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


def open_tables(settings: TablesSource, folder: Path, cache: Path) -> FileSource:
    """The source `tables` over the paths of its settings, relative to `folder`."""
    return file_source(
        settings, folder, Tables(settings.max_file_bytes, settings.max_document_bytes, columns_of(settings.columns))
    )


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


#: Attempts after the first, about a minute of waiting in all.
_RETRIES = 6


@dataclass(frozen=True)
class HuggingFace:
    """One document a row; a unit is a shard of the data set. `place` is the folder of one on this machine."""

    dataset: str
    max_document_bytes: int
    configuration: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)
    license: str | None = None
    place: Path | None = None
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        count = int(getattr(self._open(), "num_shards", None) or 1)
        # a folder may be moved
        name = self.place.name if self.place else self.dataset
        return [Unit(f"{name}/{self.split}/{number:05d}-of-{count:05d}", 0) for number in range(count)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        for position, row in self._rows(unit, start, tally):
            text, place = row.get(self.columns.text), f"{unit.name}: row {position:,}"
            if not isinstance(text, str):
                tally.set_aside("bad_records", place, f"no text under {self.columns.text!r}")
            elif len(text) > self.max_document_bytes:
                tally.set_aside("too_large", place, f"a text of {len(text):,} characters")
            elif text.strip():
                record = self.columns.record(row)
                record.setdefault("id", f"{unit.name}#{position}")
                yield position, record_document(record, place, default_license=self.license)

    def _rows(self, unit: Unit, position: int, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a shard behind `position`. A stream that breaks is opened again where it broke, after growing waits; one
        that breaks at the same row each time is set aside from there on.

        Raises SourceError when the Hub itself cannot be reached any more: what was read is kept, and another run goes on there.
        """
        number, _, count = unit.name.rpartition("/")[2].partition("-of-")
        attempt = 0
        while True:
            try:
                rows = self._open()
            except SourceError as error:
                raise SourceError(f"{unit.name}: read to row {position:,}; {error}; run again") from error
            try:
                if int(count) > 1:
                    rows = rows.shard(num_shards=int(count), index=int(number))
                for row in rows.skip(position) if position else rows:
                    position, attempt = position + 1, 0
                    yield position, row
            except Exception as error:  # what the library and its network raise in the middle of a stream
                if attempt == self._retries:
                    why = f"it broke behind row {position:,}, {attempt + 1} times: {type(error).__name__}: {_first_line(error)}"
                    tally.set_aside("broken_streams" if self.place is None else "damaged_files", unit.name, why)
                    return
                self.clock.sleep(growing_wait(attempt))
                attempt += 1
            else:
                return

    def fingerprint(self, fingerprints: ContentFingerprints | None = None) -> Any:
        if self.place is None:
            return {"dataset": self.dataset, "revision": self.revision}
        files = sorted(path for path in self.place.rglob("*") if path.is_file())
        contents = (fingerprints or ContentFingerprints()).of(files)
        return [[path.relative_to(self.place).as_posix(), content] for path, content in zip(files, contents, strict=True)]

    @property
    def _retries(self) -> int:
        """What lies on this machine reads the same each time."""
        return _RETRIES if self.place is None else 0

    def _open(self) -> Any:
        """The data set as a stream, after growing waits where a network fails.

        Raises SourceError when `datasets` is missing or the Hub cannot be reached.
        """
        try:
            import datasets
        except ImportError:
            raise SourceError(
                f"{self.dataset}: data sets of the Hub need the package `datasets`: {install_extra('hub')}"
            ) from None
        try:
            return tried_again(partial(self._loaded, datasets), self._retries, self.clock)
        except Exception as error:  # a network's many ways to fail, and the library's own errors
            raise SourceError(f"{self.dataset}: it cannot be opened: {_first_line(error)}") from error

    def _loaded(self, datasets: Any) -> Any:
        if saved := self._saved():
            return datasets.load_from_disk(str(saved)).to_iterable_dataset(num_shards=len(list(saved.glob("data-*.arrow"))))
        return datasets.load_dataset(
            str(self.place or self.dataset), self.configuration, split=self.split, revision=self.revision, streaming=True
        )

    def _saved(self) -> Path | None:
        """Where `save_to_disk` wrote the split, if it did: the folder itself, or the split's in a dictionary of splits."""
        places = (self.place, self.place / self.split) if self.place else ()
        return next((place for place in places if (place / "state.json").is_file()), None)


def open_hugging_face(settings: HuggingFaceSource, folder: Path, cache: Path) -> HuggingFace:
    """The source `hugging_face`: of the Hub, or of a folder relative to `folder` where there is one of the data set's name."""
    place = folder / settings.dataset
    return HuggingFace(
        settings.dataset,
        settings.max_document_bytes,
        settings.configuration,
        settings.split,
        settings.revision,
        columns_of(settings.columns),
        settings.license,
        place if place.is_dir() else None,
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
