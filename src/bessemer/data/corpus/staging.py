"""Segments: documents on their way from a source into buckets, in files of some thousand rows with a position to resume from.

A unit of a source is read into segments. A segment holds its rows bucket by bucket, and says how far into the unit it
goes and what was met up to there; so a killed collection reads on behind the last closed segment, and a bucket's rows
are later found in all segments without reading the others.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.object_storage import RANDOM_ACCESS_BYTES, Place, publish, unfinished
from bessemer.data.corpus.reader import SCHEMA, document_id
from bessemer.data.corpus.writer import gathered, in_buckets
from bessemer.data.sources.source import FIRST_LOSSES, Document, PositionedDocument, Tally
from bessemer.data.text.texts import hash_texts

_BYTES_PER_SEGMENT = 32 << 20
_ROWS_PER_SEGMENT = 50_000
_MOST_OPEN = 256
_MOST_NOTES = 100
_HEAD = b"bessemer.segment"

#: A document before its split is known, with the group that decides it.
SEGMENT_SCHEMA = SCHEMA.remove(SCHEMA.get_field_index("split")).append(pa.field("group", pa.string()))


@dataclass
class SegmentHead:
    """Head of a segment: the unit was read up to `position`, `is_last` when to its end. `documents` and `tally` are
    those of the unit from its beginning to there; `buckets` are those whose rows it holds, in the order of its batches."""

    position: int = 0
    is_last: bool = False
    documents: int = 0
    tally: dict[str, Any] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=list)


def write_segments(
    source: str,
    documents: Iterable[PositionedDocument],
    folder: Place,
    before: SegmentHead,
    number: int,
    tally: Tally,
    buckets: int,
) -> SegmentHead:
    """Write the documents of a unit into segments `number`, … of a folder, and return the head of the last one. before: the
    head of the segment that was written last, an empty one at the beginning. tally: what the reading of `documents` fills."""
    pending: list[Document] = []
    size, end, count = 0, before.position, before.documents

    def close(is_last: bool) -> SegmentHead:
        head = SegmentHead(end, is_last, count, _added(before.tally, tally))
        _write(folder / f"segment-{number:06d}.arrow", _rows(source, pending), head, buckets)
        return head

    for position, document in documents:
        end = position
        if not document.text.strip():
            continue
        pending.append(document)
        size, count = size + len(document.text), count + 1
        if size >= _BYTES_PER_SEGMENT or len(pending) >= _ROWS_PER_SEGMENT:
            close(False)
            pending, size, number = [], 0, number + 1
    return close(True)


def last_head(folder: Place) -> tuple[int, SegmentHead]:
    """The number of segments in a folder, and the head of the last, with the position where reading goes on."""
    paths = segment_files(folder)
    return len(paths), read_head(paths[-1]) if paths else SegmentHead()


def segment_files(folder: Place) -> list[Place]:
    """The closed segments of a unit, in order."""
    return sorted(folder.glob("segment-*.arrow"))


def read_head(path: Place) -> SegmentHead:
    """The head of a segment."""
    return _head_of(_opened(path))


def groups_and_ids(paths: Iterable[Place]) -> Iterator[tuple[str | None, str]]:
    """Group and id of every document in some segments. Of the texts nothing is read."""
    wanted = [SEGMENT_SCHEMA.get_field_index(name) for name in ("group", "id")]
    for path in paths:
        file = _opened(path, pa.ipc.IpcReadOptions(included_fields=wanted))
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            yield from zip(batch.column("group").to_pylist(), batch.column("id").to_pylist(), strict=True)


class BucketRows:
    """The rows of one bucket in some segments, which are opened when a row is needed.

    Segments that are files are mapped, at most `_MOST_OPEN` at a time: a process may have some 65,000 maps (Linux's
    `vm.max_map_count`), and several buckets are put together at once. Of objects the bucket's rows are read and kept.
    """

    def __init__(self, paths: Iterable[Place], bucket: int) -> None:
        # segments that hold the bucket, each with the number of the bucket's batch
        self._segments: list[tuple[Place, int]] = []
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        ids, sizes = [], [np.zeros(0, np.int64)]
        for path in paths:
            file = _opened(path)
            head = _head_of(file)
            if bucket in head.buckets:
                self._segments.append((path, head.buckets.index(bucket)))
                batch = self._batch(len(self._segments) - 1, file)
                # a copy, so that the mapped batch can be released
                ids.append(batch.column("id").take(pa.array(np.arange(batch.num_rows))))
                sizes.append(pc.binary_length(batch.column("text")).to_numpy().astype(np.int64))
        #: Ids of all rows, in the order of the segments, and the bytes of their texts.
        self.ids = pa.chunked_array(ids, pa.string())
        self.sizes = np.concatenate(sizes)
        self._starts = np.cumsum([0, *(len(some) for some in ids)])

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: np.ndarray) -> pa.RecordBatch:
        """Rows by their numbers, at least one, in this order; their texts have to fit into one array, of 2 GiB."""
        return gathered(self._batch, self._starts, rows)

    def _batch(self, number: int, file: pa.RecordBatchFileReader | None = None) -> pa.RecordBatch:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path, place = self._segments[number]
        batch = (file or _opened(path)).get_batch(place).replace_schema_metadata(None)
        self._open[number] = batch
        if isinstance(path, Path) and len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return batch


def in_order_of_ids(rows: BucketRows) -> np.ndarray:
    """The numbers of the rows by id; of several with one id that with the smallest (text hash, text) alone."""
    ids = np.array(rows.ids.to_numpy(), dtype="S32")
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    same = np.flatnonzero(sorted_ids[1:] == sorted_ids[:-1])
    if not len(same):
        return order
    stays = np.ones(len(order), dtype=bool)
    for start, end in _runs(same):
        several = order[start:end]
        contents = [
            (content["text_hash"][0].as_py(), content["text"][0].as_py())
            for content in (rows.take(row) for row in several[:, None])
        ]
        order[start] = min(zip(contents, several.tolist(), strict=True))[1]
        stays[start + 1 : end] = False
    return order[stays]


def _runs(same: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal neighbours, from the places whose right neighbour is equal."""
    breaks = np.flatnonzero(np.diff(same) != 1)
    for first, last in zip(np.append(0, breaks + 1), np.append(breaks, len(same) - 1), strict=True):
        yield int(same[first]), int(same[last]) + 2


def _opened(path: Place, options: pa.ipc.IpcReadOptions | None = None) -> pa.RecordBatchFileReader:
    source = (
        pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open(ahead=RANDOM_ACCESS_BYTES), mode="r")
    )
    return pa.ipc.open_file(source, options=options)


def _head_of(file: pa.RecordBatchFileReader) -> SegmentHead:
    return SegmentHead(**json.loads((file.schema.metadata or {})[_HEAD]))


def _write(path: Place, table: pa.Table, head: SegmentHead, buckets: int) -> None:
    parts = list(in_buckets(table, buckets))
    head.buckets = [bucket for bucket, _ in parts]
    schema = SEGMENT_SCHEMA.with_metadata({_HEAD: json.dumps(asdict(head)).encode()})
    partial = unfinished(path)
    with pa.ipc.new_file(partial, schema) as writer:
        for _, rows in parts:
            writer.write_batch(rows.combine_chunks().to_batches()[0].replace_schema_metadata(schema.metadata))
    publish(partial, path)


def _rows(source: str, documents: list[Document]) -> pa.Table:
    texts = pa.array([document.text for document in documents], pa.string())
    headed = any(document.heading for document in documents)
    columns: dict[str, Any] = {
        "id": [document_id(source, document.locator) for document in documents],
        "text": [_with_heading(document) for document in documents] if headed else texts,
        "text_hash": hash_texts(texts),
        "source": [source] * len(documents),
        "metadata": [sorted(document.metadata.items()) for document in documents],
    }
    columns |= {name: [getattr(document, name) for document in documents] for name in ("url", "language", "license", "group")}
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SEGMENT_SCHEMA}, schema=SEGMENT_SCHEMA)


def _with_heading(document: Document) -> str:
    return f"{document.heading}\n\n{document.text}" if document.heading else document.text


def _added(before: dict[str, Any], tally: Tally) -> dict[str, Any]:
    return {
        "files": before.get("files", 0) + tally.files,
        "bytes": before.get("bytes", 0) + tally.bytes,
        "counts": dict(Counter(before.get("counts", {})) + tally.counts),
        "notes": [*before.get("notes", []), *tally.notes][:_MOST_NOTES],
        "losses": [*before.get("losses", []), *tally.losses][:FIRST_LOSSES],
    }


def with_split(rows: pa.RecordBatch, splits: list[str]) -> pa.RecordBatch:
    """Rows of segments as documents, each in its split."""
    columns = {name: rows.column(name) for name in rows.schema.names} | {"split": pa.array(splits, pa.string())}
    return pa.RecordBatch.from_arrays([columns[field.name].cast(field.type) for field in SCHEMA], schema=SCHEMA)
