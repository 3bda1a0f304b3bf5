"""Mixtures of sources: from shares of the text to a number of epochs for every document, and their statistics.

The mixture is a column, `epochs`, of the documents that stay: 2 is read twice, and a source at 0.5 has half of its documents
at 1 and none of the others. Ids decide which half, so that it is the same on every machine, and a larger number only adds
documents. A second mixture, for the end of training, is the column `anneal_epochs`. Statistics: the training text of each
source before a mixture is applied, and what training reads of it after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.object_storage import Place
from bessemer.data.config import MixConfig
from bessemer.data.corpus.reader import TRAIN, document_files, document_schema, iterate_documents, read_part
from bessemer.data.engine import Engine, run_tasks

if TYPE_CHECKING:
    from bessemer.data.stages.transform import Change


EPOCHS, ANNEAL_EPOCHS = "epochs", "anneal_epochs"


def mixture_columns(
    mix: MixConfig | None, anneal: MixConfig | None, sizes: Callable[[], Mapping[str, int]]
) -> tuple[dict[str, dict[str, float]], Mapping[str, int]]:
    """Epochs by source of each mixture that the settings ask for, by its column, and the bytes of training text by source.
    sizes: measures those bytes; it is called when there is a mixture."""
    wanted = {column: mixture for column, mixture in ((EPOCHS, mix), (ANNEAL_EPOCHS, anneal)) if mixture is not None}
    measured = sizes() if wanted else {}
    return {column: epochs_by_source(mixture, measured) for column, mixture in wanted.items()}, measured


def epochs_by_source(config: MixConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """How often each source is read. sizes: bytes of training text that each has.

    `epochs` says it outright, 1 where it is silent. Otherwise a source's share of the bytes is its weight, or its size to the
    power 1 / temperature (Conneau et al. 2020), or its size; shares are reached as nearly as `max_epochs` lets them, and all
    together make `max_bytes`, or as many bytes as there are.
    Raises ConfigError for a source that there is not.
    """
    for name in [*config.epochs, *config.weights]:
        if name not in sizes:
            raise ConfigError(f"mix: no document is of a source {name!r}{nearest(name, list(sizes))}")
    present = {name: size for name, size in sizes.items() if size}
    total = sum(present.values())
    if config.epochs:
        epochs_of = {name: config.epochs.get(name, 1.0) for name in present}
        read = sum(epochs_of[name] * size for name, size in present.items())
        scale = min(1.0, config.max_bytes / read) if config.max_bytes and read else 1.0
        return {name: epochs * scale for name, epochs in epochs_of.items()}
    if config.weights:
        weights = {name: config.weights.get(name, 0.0) for name in present}
    else:
        weights = {name: size ** (1 / config.temperature) for name, size in present.items()}
    return _filled(weights, present, min(config.max_bytes or total, config.max_epochs * total), config.max_epochs)


def _filled(weights: Mapping[str, float], sizes: Mapping[str, int], wanted: float, most: float) -> dict[str, float]:
    """Epochs such that bytes are as the weights, no source is read more than `most` times, and what the full ones cannot
    give comes from the others."""
    epochs = dict.fromkeys(sizes, 0.0)
    open_sources, left = {name for name, weight in weights.items() if weight > 0}, wanted
    while open_sources and left > 0:
        together = sum(weights[name] for name in open_sources)
        wanted_epochs = {name: left * weights[name] / together / sizes[name] for name in open_sources}
        full = {name for name in open_sources if wanted_epochs[name] >= most}
        if not full:
            return epochs | wanted_epochs
        for name in full:
            epochs[name] = most
            left -= most * sizes[name]
        open_sources -= full
    return epochs


def repeats(ids: pa.Array, sources: pa.Array, epochs: Mapping[str, float]) -> np.ndarray:
    """Readings of each document, (N,) int64: the whole part of its source's epochs, and one more for a share of the ids."""
    # digits that decide neither the order nor the part
    digits = pc.utf8_slice_codeunits(ids, 8, 20).to_pylist()
    places = np.array([int(number, 16) for number in digits], dtype=np.float64) / 16**12
    wanted = np.array([epochs.get(name, 0.0) for name in sources.to_pylist()], dtype=np.float64)
    return (np.floor(wanted) + (places < wanted - np.floor(wanted))).astype(np.int64)


def mixed(batch: pa.RecordBatch, mixtures: Mapping[str, Mapping[str, float]]) -> tuple[pa.RecordBatch, pa.Array]:
    """The batch with a column for each mixture, and why a document is in none of them.

    mixtures: column to epochs by source; without one for `epochs` every document is read once. Documents held out for
    validation are read once, whatever the mixture says.
    """
    is_train = pc.equal(batch.column("split"), TRAIN).to_numpy(zero_copy_only=False)
    read = np.full(batch.num_rows, int(EPOCHS not in mixtures), dtype=np.int64)
    for column, epochs in mixtures.items():
        counts = np.where(is_train, repeats(batch.column("id"), batch.column("source"), epochs), 1)
        batch = batch.append_column(pa.field(column, pa.int64()), pa.array(counts))
        read += counts
    label = pc.binary_join_element_wise("mixture:", batch.column("source"), " ")
    return batch, pc.if_else(pa.array(read > 0), pa.scalar(None, pa.string()), label)


def iterate_epochs(
    folder: Path,
    columns: Sequence[str],
    split: str | None = None,
    *,
    batch_rows: int = 4096,
    skip: int = 0,
    column: str = EPOCHS,
) -> Iterator[pa.RecordBatch]:
    """`iterate_documents`, with each document as often as its epochs say: once over all, then those that are read again, …

    `skip` counts readings. A folder without the column is read once.
    """
    if column not in document_schema(folder).names:
        yield from iterate_documents(folder, columns, split, batch_rows=batch_rows, skip=skip)
        return
    epoch = 1
    while True:
        met = False
        for batch in iterate_documents(folder, list(dict.fromkeys([*columns, column])), split, batch_rows=batch_rows):
            rows = batch.filter(pc.greater_equal(batch.column(column), epoch))
            met |= rows.num_rows > 0
            left_out = min(skip, rows.num_rows)
            skip -= left_out
            if rows.num_rows > left_out:
                yield rows.slice(left_out).select(list(columns))
        if not met:
            return
        epoch += 1


def training_bytes(documents: Path, change: Callable[[], Change], engine: Engine) -> dict[str, int]:
    """Bytes of training text by source, of the documents that a stage keeps. change: gives the function that the stage applies
    to each batch."""
    sizes: Counter[str] = Counter()
    for _, sizes_of_part in run_tasks(partial(_kept_bytes, change), document_files(documents), engine):
        sizes.update(sizes_of_part)
    return sizes


def mixture_stats(
    mixtures: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], documents: Path, engine: Engine
) -> dict[str, dict[str, dict[str, Any]]]:
    """By column and source: the epochs in the settings, the bytes that training should read, and the bytes that it will.

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
