"""Sampling of a corpus to train a tokenizer on.

Every source has a rate, the fraction of its text that is drawn; whether a document is drawn is a function of the seed and the
document's id. So the sample is the same on any machine, and memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress, Task
from bessemer.core.seeds import derive_seed
from bessemer.data.corpus.reader import TRAIN, VALIDATION, iterate_documents

#: Documents in memory at a time.
ROWS_AT_ONCE = 1024

_CHECKED_BYTES = 400_000
_CHECKED_DOCUMENTS = 200
_CHECKED_CHARACTERS = 5_000
_SEEDS = 1 << 63


def bytes_by_source(documents: Path, progress: Progress) -> dict[str, dict[str, int]]:
    """Bytes of text by split and source, in one pass over the corpus."""
    sizes: dict[str, dict[str, int]] = {TRAIN: {}, VALIDATION: {}}
    with progress.task("measure text", unit="MB") as task:
        for batch in iterate_documents(documents, ["text", "source", "split"], batch_rows=ROWS_AT_ONCE):
            lengths = pc.binary_length(batch.column("text"))
            rows = pa.table({"split": batch.column("split"), "source": batch.column("source"), "bytes": lengths})
            for row in rows.group_by(["split", "source"]).aggregate([("bytes", "sum")]).to_pylist():
                of_split = sizes.setdefault(row["split"], {})
                of_split[row["source"]] = of_split.get(row["source"], 0) + row["bytes_sum"]
            task.advance((pc.sum(lengths).as_py() or 0) / 1e6)
    return sizes


def sampling_rates(sizes: Mapping[str, int], weights: Mapping[str, float], most_bytes: int) -> dict[str, float]:
    """The fraction of each source's text to draw, 0 … 1: proportional to its weight (1 where not named), as high as possible
    with at most `most_bytes` drawn in all.

    sizes: bytes by source. With no weights every rate is min(1, most_bytes / total). Raises ConfigError for a weight of
    an unknown source, or when nothing is left to draw.
    """
    for source in weights:
        if source not in sizes:
            raise ConfigError(f"tokenize.source_weights: the documents have no source {source!r}{nearest(source, list(sizes))}")
    weight_of = {source: weights.get(source, 1.0) for source in sizes}
    weighted_bytes = sum(weight_of[source] * size for source, size in sizes.items())
    if not weighted_bytes:
        raise ConfigError("tokenize.source_weights: every source with text has the weight 0, so there is nothing to train on")
    scale = min(1 / max(weight_of.values()), most_bytes / weighted_bytes)
    return {source: scale * weight for source, weight in weight_of.items()}


class TrainingTexts:
    """The texts drawn for training, streamed. bytes: of the texts of the last iteration."""

    def __init__(self, documents: Path, rates: Mapping[str, float], seed: int, task: Task) -> None:
        self._documents = documents
        self._rates = rates
        self._seed = seed
        self._task = task
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        self.bytes = 0
        whole = all(rate >= 1 for rate in self._rates.values())
        for batch in iterate_documents(self._documents, ["id", "source", "text"], split=TRAIN, batch_rows=ROWS_AT_ONCE):
            chosen = batch if whole else batch.filter(pa.array(self._drawn(batch), pa.bool_()))
            yield from chosen.column("text").to_pylist()
            self.bytes += pc.sum(pc.binary_length(chosen.column("text"))).as_py() or 0
            self._task.reach(self.bytes / 1e6)

    def _drawn(self, batch: pa.RecordBatch) -> list[bool]:
        names = zip(batch.column("id").to_pylist(), batch.column("source").to_pylist(), strict=True)
        return [derive_seed(self._seed, id) < self._rates[source] * _SEEDS for id, source in names]


def texts_to_check(documents: Path) -> list[str]:
    """A few hundred kilobytes of training text to compare encoders on: the first documents, which come from all sources, since
    documents are sorted by ids that are hashes. Long ones are truncated."""
    texts: list[str] = []
    taken = 0
    for batch in iterate_documents(documents, ["text"], split=TRAIN, batch_rows=_CHECKED_DOCUMENTS):
        for text in batch.column("text").to_pylist():
            texts.append(text[:_CHECKED_CHARACTERS])
            taken += len(texts[-1])
            if taken >= _CHECKED_BYTES:
                return texts
    return texts
