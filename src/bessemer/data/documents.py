"""Documents on disk: Parquet files by bucket of the id, the same bytes whatever wrote them and in whatever order.

`documents/part-00.parquet` … hold the rows whose id, taken as a number, leaves that remainder; rows are sorted by id.
Another engine, number of threads or order of input files therefore gives the same files (with the same version of
pyarrow, which signs each file).
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_bytes

#: Format number of a documents folder, kept in each file's schema metadata under `bessemer.format`.
DOCUMENTS_FORMAT = 1
BUCKETS = 16
_FORMAT_KEY = b"bessemer.format"
_ROWS_PER_GROUP = 4096
_SPILL = ".spill"

TRAIN, VALIDATION = "train", "validation"

#: The columns that every document has. Scores follow as float64 or bool columns, and `reason` in rejected folders.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("text_hash", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("language", pa.string()),
        pa.field("license", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("metadata", pa.map_(pa.string(), pa.string())),
    ]
)


def document_id(source: str, locator: str) -> str:
    """The id of a document for good: 128 bits, hexadecimal, of its source's name and its stable place there."""
    return hash_bytes(source.encode(), locator.encode())


def hash_text(text: str) -> str:
    """Hash under which two texts are the same: NFC, runs of white space as one space, none at the ends."""
    return hash_bytes(" ".join(unicodedata.normalize("NFC", text).split()).encode())


def bucket_of(ids: pa.Array, buckets: int = BUCKETS) -> np.ndarray:
    """The part that each id belongs to: the id as a number, modulo `buckets` (a divisor of 65,536)."""
    assert 65536 % buckets == 0
    last_digits = pc.utf8_slice_codeunits(ids, start=-4).to_pylist()
    return np.fromiter((int(digits, 16) % buckets for digits in last_digits), dtype=np.int64, count=len(ids))


@dataclass(frozen=True)
class Written:
    """What a writer has put on disk."""

    documents: int
    #: Rows left out because another row with the same id came before it in the order of (id, text hash, text).
    repeated_ids: int


class DocumentWriter:
    """Takes documents in any order and, on `close`, leaves a folder of sorted parts.

    Rows wait in one scratch file per bucket, so that memory holds one bucket at a time.
    """

    def __init__(self, folder: Path, schema: pa.Schema = SCHEMA, *, buckets: int = BUCKETS) -> None:
        self.folder, self.buckets = folder, buckets
        self._schema = schema.with_metadata({_FORMAT_KEY: str(DOCUMENTS_FORMAT).encode()})
        self._spill = folder / _SPILL
        shutil.rmtree(self._spill, ignore_errors=True)
        self._spill.mkdir(parents=True)
        self._streams: dict[int, pa.RecordBatchFileWriter] = {}
        #: What is on disk; set by `close`.
        self.written: Written | None = None

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Add documents. Columns are taken by name and cast to the writer's schema."""
        table = pa.table({field.name: rows.column(field.name).cast(field.type) for field in self._schema}, schema=self._schema)
        buckets = bucket_of(table.column("id"), self.buckets)
        for bucket in np.unique(buckets).tolist():
            if bucket not in self._streams:
                self._streams[bucket] = pa.ipc.new_file(self._spill / f"{bucket}.arrow", self._schema)
            self._streams[bucket].write_table(table.take(pa.array(np.flatnonzero(buckets == bucket))))

    def close(self) -> Written:
        """Sort each bucket, drop repeated ids, and write the parts."""
        documents = repeated = 0
        for stream in self._streams.values():
            stream.close()
        for bucket in range(self.buckets):
            if bucket in self._streams:
                with pa.memory_map(str(self._spill / f"{bucket}.arrow")) as source:
                    rows = pa.ipc.open_file(source).read_all()
                    rows = rows.take(pc.sort_indices(rows, [(key, "ascending") for key in ("id", "text_hash", "text")]))
                    first = _first_of_each_id(rows.column("id"))
                    repeated += rows.num_rows - int(first.sum())
                    rows = rows.filter(pa.array(first))
                    documents += rows.num_rows
                    self._write_part(bucket, rows)
            else:
                self._write_part(bucket, self._schema.empty_table())
        shutil.rmtree(self._spill)
        self.written = Written(documents, repeated)
        return self.written

    def _write_part(self, bucket: int, rows: pa.Table) -> None:
        with pq.ParquetWriter(
            self.folder / part_name(bucket),
            self._schema,
            version="2.6",
            compression="zstd",
            compression_level=3,
            use_dictionary=["source", "language", "license", "split"],
            write_statistics=True,
        ) as writer:
            # One chunk per row group: where a chunk of a column ends must not show in the file.
            for start in range(0, rows.num_rows, _ROWS_PER_GROUP):
                writer.write_table(rows.slice(start, _ROWS_PER_GROUP).combine_chunks(), row_group_size=_ROWS_PER_GROUP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()


def _first_of_each_id(ids: pa.ChunkedArray) -> np.ndarray:
    values = ids.to_numpy(zero_copy_only=False)
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return first


def write_documents(
    folder: Path, batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema = SCHEMA, *, buckets: int = BUCKETS
) -> Written:
    """Write documents that come in any order to `folder`. Raises OSError when the disk is full."""
    writer = DocumentWriter(folder, schema, buckets=buckets)
    for batch in batches:
        writer.write(batch)
    return writer.close()


def part_name(bucket: int) -> str:
    """File name of a bucket."""
    return f"part-{bucket:02d}.parquet"


def document_files(folder: Path) -> list[Path]:
    """The parts of a documents folder, in order. Raises ArtefactError when there are none or the format is not ours."""
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise ArtefactError(f"{folder}: this is not a folder of documents: it has no part-*.parquet")
    try:
        found = (pq.read_schema(parts[0]).metadata or {}).get(_FORMAT_KEY)
    except pa.ArrowInvalid as error:
        raise ArtefactError(f"{parts[0]}: this Parquet file is damaged ({error})") from None
    if found != str(DOCUMENTS_FORMAT).encode():
        raise ArtefactError(
            f"{parts[0]}: this version reads documents of format {DOCUMENTS_FORMAT}, "
            f"not {found.decode() if found else 'files without one'}; run the recipe again"
        )
    return parts


def document_schema(folder: Path) -> pa.Schema:
    """The columns of a documents folder, without file metadata."""
    return pq.read_schema(document_files(folder)[0]).remove_metadata()


def iterate_documents(
    folder: Path, columns: Sequence[str] | None = None, split: str | None = None, *, batch_rows: int = 4096, skip: int = 0
) -> Iterator[pa.RecordBatch]:
    """Stream the documents, part by part in the order of ids, at most `batch_rows` at a time.

    `columns` None gives all of them; `split` keeps one split's rows; the first `skip` of those are left out, without
    reading the parts that hold no others. Raises ArtefactError when the folder is not one.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *(["split"] if split else [])]))
    for part in document_files(folder):
        if skip and (rows_here := _rows_of_part(part, split)) <= skip:
            skip -= rows_here
            continue
        with pq.ParquetFile(part) as file:
            for batch in _batches_of_part(file, wanted, batch_rows):
                rows = batch if split is None else batch.filter(pc.equal(batch.column("split"), split))
                left_out = min(skip, rows.num_rows)
                skip -= left_out
                rows = rows.slice(left_out)
                if rows.num_rows:
                    yield rows if columns is None else rows.select(list(columns))


def count_documents(folder: Path, split: str | None = None) -> int:
    """How many documents a folder holds, in one split or in all."""
    return sum(_rows_of_part(part, split) for part in document_files(folder))


def _rows_of_part(part: Path, split: str | None) -> int:
    if split is None:
        return int(pq.read_metadata(part).num_rows)
    with pq.ParquetFile(part) as file:
        batches = _batches_of_part(file, ["split"], _ROWS_PER_GROUP)
        return sum(pc.sum(pc.equal(batch.column("split"), split)).as_py() or 0 for batch in batches)


def _batches_of_part(file: pq.ParquetFile, columns: list[str] | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """A part's rows, one row group after the other: read in one go, Arrow keeps the compressed pages until the end."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns)
