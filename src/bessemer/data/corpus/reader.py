"""Reader of document folders, Parquet files by bucket of the id: in order or by id; reasons of dropped documents; removed ids.

`documents/part-00.parquet` … hold the rows whose id, taken as a number, leaves that remainder; rows are sorted by id. Another
engine, number of threads or order of input files therefore gives the same files (with the same version of pyarrow, which signs
each file). The column `reason` is null where a document is kept. The store lists the ids of removed documents, which `collect`
leaves out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_bytes
from bessemer.core.object_storage import RANDOM_ACCESS_BYTES, Place
from bessemer.core.store import write_text
from bessemer.data.corpus.remote import has_index, stored_parts

#: Format number of a documents folder, kept in each file's schema metadata under `bessemer.format`.
DOCUMENTS_FORMAT = 1
BUCKETS = 16
FORMAT_KEY = b"bessemer.format"
_ROWS_PER_BATCH = 4096
_ROWS_PER_FILTER = 1024

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


def bucket_of(ids: pa.Array, buckets: int = BUCKETS) -> np.ndarray:
    """The part that each id belongs to: the id as a number, modulo `buckets` (a divisor of 65,536)."""
    assert 65536 % buckets == 0
    last_digits = pc.utf8_slice_codeunits(ids, start=-4).to_pylist()
    return np.fromiter((int(digits, 16) % buckets for digits in last_digits), dtype=np.int64, count=len(ids))


def part_name(bucket: int, buckets: int = BUCKETS) -> str:
    """File name of the part of a bucket; names sort as the buckets do."""
    return f"part-{bucket:0{max(2, len(str(buckets - 1)))}d}.parquet"


def holds_documents(folder: Path) -> bool:
    """Whether a folder has parts, its own or on object storage."""
    return has_index(folder) or any(folder.glob("part-*.parquet"))


def document_files(folder: Path) -> list[Place]:
    """The parts of a documents folder, in order, wherever they lie. Raises ArtefactError when there are none or the format is
    not ours."""
    parts: list[Place] = [*stored_parts(folder)] if has_index(folder) else sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise ArtefactError(f"{folder}: this is not a folder of documents: it has no part-*.parquet")
    with opened_part(parts[0]) as file:
        stated = (file.schema_arrow.metadata or {}).get(FORMAT_KEY)
    if stated != str(DOCUMENTS_FORMAT).encode():
        raise ArtefactError(
            f"{parts[0]}: this version reads documents of format {DOCUMENTS_FORMAT}, "
            f"not {stated.decode() if stated else 'files without one'}; run the recipe again"
        )
    return parts


@contextmanager
def part_source(part: Place) -> Iterator[Path | io.RawIOBase]:
    """A part as Arrow opens it: its path, or a stream. Raises ArtefactError when it is missing."""
    if isinstance(part, Path):
        yield part
        return
    try:
        stream = part.open(ahead=RANDOM_ACCESS_BYTES)
    except FileNotFoundError:
        raise ArtefactError(f"{part}: this part of the documents is missing; delete the stage's folder and run again") from None
    with stream:
        yield stream


@contextmanager
def opened_part(part: Place) -> Iterator[pq.ParquetFile]:
    """A part, opened. Raises ArtefactError when it is missing or no Parquet file."""
    with part_source(part) as source:
        try:
            file = pq.ParquetFile(source)
        except pa.ArrowInvalid as error:
            raise ArtefactError(f"{part}: this Parquet file is damaged ({error})") from None
        with file:
            yield file


def document_schema(folder: Path) -> pa.Schema:
    """The columns of a documents folder, without file metadata."""
    with opened_part(document_files(folder)[0]) as file:
        return file.schema_arrow.remove_metadata()


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
        with opened_part(part) as file:
            for batch in _batches_of_part(file, wanted, batch_rows):
                rows = batch if split is None else batch.filter(pc.equal(batch.column("split"), split))
                left_out = min(skip, rows.num_rows)
                skip -= left_out
                rows = rows.slice(left_out)
                if rows.num_rows:
                    yield rows if columns is None else rows.select(list(columns))


def count_documents(folder: Path, split: str | None = None) -> int:
    """The number of documents in a folder, of one split or of all."""
    return sum(_rows_of_part(part, split) for part in document_files(folder))


def _rows_of_part(part: Place, split: str | None) -> int:
    with opened_part(part) as file:
        if split is None:
            return int(file.metadata.num_rows)
        batches = _batches_of_part(file, ["split"], _ROWS_PER_BATCH)
        return sum(pc.sum(pc.equal(batch.column("split"), split)).as_py() or 0 for batch in batches)


def read_part(path: Place, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Stream one part's rows, at most 1,024 at a time: what a filter is given at once."""
    with opened_part(path) as file:
        yield from _batches_of_part(file, None if columns is None else list(columns), _ROWS_PER_FILTER)


def _batches_of_part(file: pq.ParquetFile, columns: list[str] | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """A part's rows, one row group after the other: read in one go, Arrow keeps the compressed pages until the end."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns, use_threads=False)


#: Where a stage leaves documents: those that go on, and those that it dropped.
SIDES = ("documents", "rejected")


def is_document_id(text: str) -> bool:
    """Whether a text has the form of an id: 32 hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def part_of(folder: Path, identity: str) -> Place:
    """The part of a documents folder in which an id lies if it lies there. Raises ArtefactError when the folder is none."""
    files = document_files(folder)
    return files[int(bucket_of(pa.array([identity]), len(files))[0])]


def find_document(folder: Path, identity: str) -> dict[str, Any] | None:
    """A document's row; None when the folder does not hold it. Row groups that cannot hold it are not read."""
    with part_source(part_of(folder, identity)) as source:
        rows = pq.read_table(source, filters=[("id", "==", identity)])
    return rows.to_pylist()[0] if rows.num_rows else None


@dataclass(frozen=True)
class Sighting:
    """A document as a stage left it: on one of `SIDES`."""

    stage: str
    side: str
    row: dict[str, Any]


def history(stages: Iterable[tuple[str, Path]], identity: str) -> Iterator[Sighting]:
    """A document's sightings in the data stages' folders that hold it; folders of other stages are skipped."""
    for stage, folder in stages:
        for side in SIDES:
            if holds_documents(folder / side) and (row := find_document(folder / side, identity)) is not None:
                yield Sighting(stage, side, row)


#: The file in the store, one id a line. `bessemer forget` adds to it.
REMOVED_IDS = "forgotten.txt"


def removed_ids(store: Path) -> frozenset[str]:
    """The ids in a store's list; none where there is no list. Raises ArtefactError for a line that is no id: a
    damaged list must not let documents come back."""
    path = store / REMOVED_IDS
    if not path.exists():
        return frozenset()
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not is_document_id(line):
            raise ArtefactError(f"{path}, line {number}: this is not the id of a document (32 hexadecimal digits)")
    return frozenset(line for line in lines if line)


def add_removed_ids(store: Path, ids: Iterable[str]) -> None:
    """Add ids to a store's list, which stays sorted."""
    store.mkdir(parents=True, exist_ok=True)
    known = removed_ids(store) | set(ids)
    write_text(store / REMOVED_IDS, "".join(f"{identity}\n" for identity in sorted(known)))


def without_removed(order: np.ndarray, ids: pa.ChunkedArray, removed: frozenset[str]) -> np.ndarray:
    """The numbers of rows in `order`, without those whose id was removed. Of the rows only the ids are read."""
    if not removed:
        return order
    gone = pc.is_in(ids, pa.array(sorted(removed), pa.string())).to_numpy()
    return order[~gone[order]]
