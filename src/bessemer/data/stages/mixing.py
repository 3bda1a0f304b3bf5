"""Mixtures of what a stage leaves: how much text each source has, how often each is read, and what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.object_storage import Place
from bessemer.data.config import MixedConfig
from bessemer.data.corpus.reader import TRAIN, document_files, read_part
from bessemer.data.engine import run_pieces
from bessemer.data.stages.mixture import ANNEAL_EPOCHS, EPOCHS, epochs_by_source, told
from bessemer.data.stages.transform import Change


def mixtures_of(
    config: MixedConfig, documents: Path, change: Callable[[], Change]
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Epochs by source of each mixture that the settings ask for, and the bytes of training text that they share out.

    change: what the stage does to the documents, of which those count that it leaves.
    """
    wanted = {EPOCHS: config.mix, ANNEAL_EPOCHS: config.anneal}
    if all(mixture is None for mixture in wanted.values()):
        return {}, {}
    sizes: Counter[str] = Counter()
    for _, found in run_pieces(partial(_training_bytes, change), document_files(documents), config.where()):
        sizes.update(found)
    return {column: epochs_by_source(mixture, sizes) for column, mixture in wanted.items() if mixture is not None}, sizes


def mixtures_told(
    config: MixedConfig, mixtures: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], out: Path
) -> dict[str, Any]:
    """By column what was wanted of each source and what came of it in `out/documents`."""
    said = {}
    for column, epochs in mixtures.items():
        read: Counter[str] = Counter()
        for _, found in run_pieces(partial(_read_bytes, column), document_files(out / "documents"), config.where()):
            read.update(found)
        said[column] = told(epochs, sizes, read)
    return said


def _training_bytes(change: Callable[[], Change], part: Place) -> dict[str, int]:
    """Bytes of training text that a part would keep, by source."""
    apply, sizes = change(), Counter[str]()
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
