"""Writers of document folders: from rows sorted by id (`PartWriter`), or in any order (`DocumentWriter`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.object_storage import Place, publish, unfinished
from bessemer.data.corpus.reader import BUCKETS, DOCUMENTS_FORMAT, FORMAT_KEY, SCHEMA, bucket_of, part_name

_ROWS_PER_GROUP = 4096
_BYTES_PER_GROUP = 64 << 20
_ROWS_PER_PIECE = 1024
_SPILL = ".spill"


class PartWriter:
    """Writes one part from rows that come in the order of their ids, in batches of any size.

    A row group ends after 4,096 rows, or with the row that brings its text to 64 MiB: a rule about rows alone, so that
    the bytes do not depend on batches, and what is held in memory does not depend on the part. The file has its place
    when it is complete.
    """

    def __init__(self, path: Place, schema: pa.Schema) -> None:
        self.path = path
        self._schema = _as_written(schema)
        self._partial = unfinished(path)
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0
        self._writer = pq.ParquetWriter(
            self._partial,
            self._schema,
            version="2.6",
            compression="zstd",
            compression_level=3,
            use_dictionary=["source", "language", "license", "split"],
            write_statistics=True,
        )

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Add rows; their columns are taken by name and cast to the writer's schema."""
        table = in_schema(rows, self._schema)
        ends = np.cumsum(pc.binary_length(table.column("text")).to_numpy(zero_copy_only=False), dtype=np.int64)
        start = before = 0
        while start < table.num_rows:
            full = int(np.searchsorted(ends, before + _BYTES_PER_GROUP - self._bytes, side="left")) + 1
            end = min(table.num_rows, start + _ROWS_PER_GROUP - self._rows, full)
            self._pending.append(table.slice(start, end - start))
            self._rows += end - start
            self._bytes += int(ends[end - 1]) - before
            start, before = end, int(ends[end - 1])
            if self._rows == _ROWS_PER_GROUP or self._bytes >= _BYTES_PER_GROUP:
                self._flush()

    def close(self) -> None:
        """Write what is left, and give the file its place."""
        self._flush()
        self._writer.close()
        publish(self._partial, self.path)

    def _flush(self) -> None:
        if self._pending:
            # One chunk, since the ends of a column's chunks would show in the file.
            group = pa.concat_tables(self._pending).combine_chunks()
            self._writer.write_table(group, row_group_size=group.num_rows)
            self._pending = []
            self._rows = 0
            self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()
            self._partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Written:
    """Result of a `DocumentWriter`."""

    documents: int
    #: Rows left out because another row with the same id came before it in the order of (id, text hash, text).
    repeated_ids: int


class DocumentWriter:
    """Takes documents in any order and, on `close`, leaves a folder of sorted parts. Rows wait in one scratch file per bucket,
    so that memory holds one bucket at a time."""

    def __init__(self, folder: Path, schema: pa.Schema = SCHEMA, *, buckets: int = BUCKETS) -> None:
        self.folder = folder
        self.buckets = buckets
        self._schema = schema
        self._spill = folder / _SPILL
        shutil.rmtree(self._spill, ignore_errors=True)
        self._spill.mkdir(parents=True)
        self._streams: dict[int, pa.RecordBatchFileWriter] = {}

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Add documents. Columns are taken by name and cast to the writer's schema."""
        for batch in in_schema(rows, self._schema).to_batches():
            for bucket, some in in_buckets(batch, self.buckets):
                if bucket not in self._streams:
                    self._streams[bucket] = pa.ipc.new_file(self._spill / f"{bucket}.arrow", self._schema)
                self._streams[bucket].write_batch(some)

    def close(self) -> Written:
        """Sort each bucket, drop repeated ids, and write the parts."""
        documents = repeated = 0
        for stream in self._streams.values():
            stream.close()
        for bucket in range(self.buckets):
            with PartWriter(self.folder / part_name(bucket, self.buckets), self._schema) as writer:
                if bucket in self._streams:
                    with pa.memory_map(str(self._spill / f"{bucket}.arrow")) as source:
                        spilt = pa.ipc.open_file(source).read_all()
                        order = order_of_ids(spilt)
                        for rows in taken(spilt, order):
                            writer.write(rows)
                    repeated += spilt.num_rows - len(order)
                    documents += len(order)
        shutil.rmtree(self._spill)
        return Written(documents, repeated)


def write_documents(
    folder: Path, batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema = SCHEMA, *, buckets: int = BUCKETS
) -> Written:
    """Write documents that come in any order to `folder`. Raises OSError when the disk is full."""
    writer = DocumentWriter(folder, schema, buckets=buckets)
    for batch in batches:
        writer.write(batch)
    return writer.close()


@cache
def _as_written(schema: pa.Schema) -> pa.Schema:
    """A schema as files hold it, which one that was read, or came from another process, is not: inner names differ."""
    known = [field.name for field in SCHEMA]
    fields = [SCHEMA.field(at.name) if at.name in known else pa.field(at.name, at.type, at.nullable) for at in schema]
    return pa.schema(fields, {FORMAT_KEY: str(DOCUMENTS_FORMAT).encode()})


def in_schema(rows: pa.RecordBatch | pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns that a schema names, in its order and types."""
    return pa.Table.from_arrays([as_type(rows.column(field.name), field.type) for field in schema], schema=schema)


def as_type(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """The column, cast where it has another type. Nested types count as others: their inner names may differ."""
    return column if column.type == kind and not pa.types.is_nested(kind) else column.cast(kind)


def in_buckets(rows: pa.RecordBatch, buckets: int) -> Iterable[tuple[int, pa.RecordBatch]]:
    """The rows of each bucket that has some, in their order."""
    places = bucket_of(rows.column("id"), buckets)
    for bucket in np.unique(places).tolist():
        yield bucket, rows.take(pa.array(np.flatnonzero(places == bucket)))


def order_of_ids(rows: pa.Table) -> np.ndarray:
    """The numbers of the rows by (id, text hash, text), of those with one id the first alone."""
    order = pc.sort_indices(rows, [(key, "ascending") for key in ("id", "text_hash", "text")]).to_numpy().astype(np.int64)
    ids = rows.column("id").to_numpy()[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = ids[1:] != ids[:-1]
    return order[first]


def taken(table: pa.Table, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Rows of a table by their numbers, in this order and in batches, however much text there is. Arrow's own `take` joins the
    chunks of a column first, and an array of strings holds 2 GiB."""
    batches = table.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    sizes = np.concatenate([np.zeros(0, np.int64), *(pc.binary_length(batch.column("text")).to_numpy() for batch in batches)])
    for some in batch_slices(sizes[rows]):
        yield gathered(batches.__getitem__, starts, rows[some])


def batch_slices(sizes: np.ndarray) -> Iterator[slice]:
    """Slices of rows: at most 1,024, and of at most 64 MiB or a single row, given the bytes of each."""
    ends = np.cumsum(sizes, dtype=np.int64)
    start = before = 0
    while start < len(sizes):
        end = max(start + 1, int(np.searchsorted(ends, before + _BYTES_PER_GROUP, side="right")))
        end = min(end, start + _ROWS_PER_PIECE)
        yield slice(start, end)
        start, before = end, int(ends[end - 1])


def gathered(batch: Callable[[int], pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.RecordBatch:
    """Rows of many batches by their numbers, at least one, in this order: of each batch only these are copied. batch: by its
    number; starts: the number of the first row of each, and that of all."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(numbers, kind="stable")
    gathered_rows = []
    for some in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        number = int(numbers[some[0]])
        gathered_rows.append(batch(number).take(pa.array(rows[some] - starts[number])))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(gathered_rows).combine_chunks().to_batches()[0].take(pa.array(back))
