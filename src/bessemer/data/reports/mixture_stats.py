"""Statistics of mixtures: the training text of each source before one is applied, and what training reads of it after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.object_storage import Place
from bessemer.data.corpus.reader import TRAIN, document_files, read_part
from bessemer.data.engine import Engine, run_tasks

if TYPE_CHECKING:
    from bessemer.data.stages.transform import Change


def training_bytes(documents: Path, change: Callable[[], Change], engine: Engine) -> dict[str, int]:
    """Bytes of training text by source, of the documents that a stage keeps.

    change: gives the function that the stage applies to each batch.
    """
    sizes: Counter[str] = Counter()
    for _, sizes_of_part in run_tasks(partial(_kept_bytes, change), document_files(documents), engine):
        sizes.update(sizes_of_part)
    return sizes


def mixture_stats(
    mixtures: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], documents: Path, engine: Engine
) -> dict[str, dict[str, dict[str, Any]]]:
    """By column and source: the epochs asked for, the bytes that training should read, and the bytes that it will.

    mixtures: epochs by source of each column. sizes: bytes of training text by source. documents: as the stage wrote them.
    """
    stats = {}
    for column, epochs in mixtures.items():
        read: Counter[str] = Counter()
        for _, read_of_part in run_tasks(partial(_read_bytes, column), document_files(documents), engine):
            read.update(read_of_part)
        stats[column] = {
            name: {
                "epochs": round(epochs.get(name, 0.0), 4),
                "expected_bytes": round(epochs.get(name, 0.0) * size),
                "bytes": read[name],
            }
            for name, size in sorted(sizes.items())
        }
    return stats


def _kept_bytes(change: Callable[[], Change], part: Place) -> dict[str, int]:
    """Bytes of training text that a part would keep, by source."""
    apply = change()
    sizes = Counter[str]()
    for batch in read_part(part):
        rows = apply(batch)
        rows = rows.filter(pc.and_(pc.is_null(rows.column("reason")), pc.equal(rows.column("split"), TRAIN)))
        _count(sizes, rows.column("source"), pc.binary_length(rows.column("text")))
    return dict(sizes)


def _read_bytes(column: str, part: Place) -> dict[str, int]:
    """Bytes that training will read of a part, by source."""
    sizes = Counter[str]()
    for batch in read_part(part, ["text", "source", "split", column]):
        rows = batch.filter(pc.equal(batch.column("split"), TRAIN))
        lengths = pc.cast(pc.binary_length(rows.column("text")), pa.int64())
        _count(sizes, rows.column("source"), pc.multiply(lengths, rows.column(column)))
    return dict(sizes)


def _count(sizes: Counter[str], sources: pa.Array, lengths: pa.Array) -> None:
    for source, length in zip(sources.to_pylist(), lengths.to_pylist(), strict=True):
        sizes[source] += length
