from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bessemer.data.corpus import staging
from bessemer.data.corpus.reader import SCHEMA, bucket_of
from bessemer.data.corpus.staging import BucketRows, SegmentHead, in_order_of_ids, segment_files, write_segments
from bessemer.data.corpus.writer import batch_slices, taken
from bessemer.data.sources.source import Document, Tally


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Twenty segments of five documents, of which every fourth has an id that came before."""
    monkeypatch.setattr(staging, "_ROWS_PER_SEGMENT", 5)
    found = ((number, Document(str(number % 75), f"text {number}")) for number in range(100))
    write_segments("mine", found, tmp_path / "unit", SegmentHead(), 0, Tally(), 2)
    return segment_files(tmp_path / "unit")[:20]


def mapped(folder: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(folder))


def test_only_so_many_segments_are_mapped_at_a_time(paths, monkeypatch):
    unlimited = [BucketRows(paths, bucket) for bucket in range(2)]
    orders = [in_order_of_ids(rows) for rows in unlimited]
    expected = [rows.take(order).to_pylist() for rows, order in zip(unlimited, orders, strict=True)]
    del unlimited
    monkeypatch.setattr(staging, "_MOST_OPEN", 3)
    for bucket in range(2):
        rows = BucketRows(paths, bucket)
        assert np.array_equal(in_order_of_ids(rows), orders[bucket])
        assert rows.take(orders[bucket]).to_pylist() == expected[bucket]
        if Path("/proc/self/maps").exists():
            # a thread of Arrow's lets go of what it has read some milliseconds after the call
            until = time.monotonic() + 10
            while mapped(paths[0].parent) > 3:
                assert time.monotonic() < until
        del rows
    ids = [row["id"] for part in expected for row in part]
    assert len(set(ids)) == len(ids) == 75
    assert all((bucket_of(pa.array([row["id"] for row in part]), 2) == bucket).all() for bucket, part in enumerate(expected))


def test_rows_are_taken_from_more_text_than_an_array_holds():
    """Of three gigabytes, which nobody writes and nobody reads, the small rows beside them."""
    huge = mmap.mmap(-1, 3 << 29)
    batches = []
    for number in range(2):
        offsets = pa.array([0, 4, 3 << 29], pa.int32()).buffers()[1]
        huge[:4] = b"text"
        texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(huge))
        batches.append(pa.record_batch({"id": pa.array([f"{number}a", f"{number}b"]), "text": texts}))
    table = pa.Table.from_batches(batches)
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        table.take(pa.array([2, 0]))
    assert [piece.to_pylist() for piece in taken(table, np.array([2, 0]))] == [
        [{"id": "1a", "text": "text"}, {"id": "0a", "text": "text"}]
    ]


def test_pieces_are_of_so_many_rows_and_bytes():
    most = 64 << 20
    assert list(batch_slices(np.zeros(0, np.int64))) == []
    assert list(batch_slices(np.array([most + 1, 1, most - 1, 1]))) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert list(batch_slices(np.ones(2500, np.int64))) == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]


def test_no_rows_are_taken_from_nothing():
    assert list(taken(SCHEMA.empty_table(), np.zeros(0, np.int64))) == []
