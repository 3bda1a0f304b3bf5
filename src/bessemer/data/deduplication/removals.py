"""Removals of a deduplication method: documents to drop, each with the one that it repeats, or spans to cut out of texts.

In a chain of methods each reads what the one before leaves; one last reading applies all removals.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.object_storage import Place, read_range
from bessemer.data.deduplication.corpus import Corpus, Parts, parse_ids, ranks, write_ids
from bessemer.data.deduplication.words import count_words, fold_table, is_white, length_in_words
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts, rehashed


class Removals(Protocol):
    """Result of a method. It is applied to batches in any order, by any number of workers."""

    @property
    def reads_texts(self) -> bool:
        """Whether `apply` looks at the texts; otherwise ids are enough, and any texts come back as they are."""

    def apply(self, ids: pa.Array, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
        """The new texts and, for each document, the reason to drop it or null."""


@dataclass(frozen=True)
class DuplicateRemovals:
    """K documents to drop and the document that stays in place of each.

    dropped (K, 2) uint64, sorted, and survivors (K, 2): halves of ids. similarities (K,) float32 from 0 to 1, NaN where
    none was measured. `wording` begins the reasons: `near duplicate` gives `near duplicate of ID (0.87)`.
    """

    wording: str
    dropped: np.ndarray
    survivors: np.ndarray
    similarities: np.ndarray
    reads_texts: ClassVar[bool] = False

    @classmethod
    def of(
        cls, wording: str, corpus: Corpus, dropped: np.ndarray, survivors: np.ndarray, similarities: np.ndarray | None = None
    ) -> DuplicateRemovals:
        """From numbers, (K,) each. Documents of the earlier corpus are left alone."""
        if similarities is None:
            similarities = np.full(len(dropped), np.nan, dtype=np.float32)
        rows = corpus.rows_of(dropped)
        order = np.argsort(rows)
        own = order[dropped[order] >= corpus.first]
        replacing = corpus.rows_of(survivors[own])
        return cls(wording, corpus.ids[rows[own]], corpus.ids[replacing], similarities[own].astype(np.float32))

    def __len__(self) -> int:
        return len(self.dropped)

    def reasons(self, ids: pa.Array) -> pa.Array:
        """Why each document is dropped: `WORDING of ID`, with the similarity where it is known; null for those that stay."""
        rows = ranks(self.dropped, parse_ids(ids))
        reasons: list[str | None] = [None] * len(rows)
        hits = np.flatnonzero(rows >= 0)
        survivors, similarities = write_ids(self.survivors[rows[hits]]), self.similarities[rows[hits]].tolist()
        for row, survivor, similarity in zip(hits.tolist(), survivors, similarities, strict=True):
            measured = "" if np.isnan(similarity) else f" ({similarity:.2f})"
            reasons[row] = f"{self.wording} of {survivor}{measured}"
        return pa.array(reasons, pa.string())

    def apply(self, ids: pa.Array, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
        return texts, self.reasons(ids)


def span_type(corpus: Corpus) -> np.dtype:
    """A span to cut: the document's number, its first byte and the one after its last; `keep` 1 protects instead."""
    return np.dtype([("number", corpus.number_type), ("start", "<u4"), ("end", "<u4"), ("keep", "u1")])


_BOUNDS = np.dtype([("start", "<u4"), ("end", "<u4")])
_PARTS = 64


@dataclass(frozen=True)
class SpanRemovals:
    """Spans to cut out of texts, and documents to drop because too little of them would be left.

    ids (N, 2) uint64, sorted: the documents with spans to cut; offsets (N + 1,) int64: where the spans of each lie in the
    file `bounds`. Reasons are `WORDING`, e.g. `too little left without repeated lines`.
    """

    wording: str
    ids: np.ndarray
    offsets: np.ndarray
    bounds: Place
    #: A document that was cut and has fewer words left is dropped.
    least_words: int
    reads_texts: ClassVar[bool] = True

    @property
    def spans(self) -> int:
        """The number of spans to cut."""
        return int(self.offsets[-1])

    def apply(self, ids: pa.Array, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
        rows = ranks(self.ids, parse_ids(ids))
        reasons: list[str | None] = [None] * len(rows)
        hits = np.flatnonzero(rows >= 0)
        if not len(hits):
            return texts, pa.array(reasons, pa.string())
        sizes = np.zeros(len(rows), dtype=np.int64)
        sizes[hits] = self.offsets[rows[hits] + 1] - self.offsets[rows[hits]]
        remaining, words = cut(Texts.from_arrow(texts), self._bounds_of(rows[hits]), np.concatenate([[0], np.cumsum(sizes)]))
        for row in hits[words[hits] < self.least_words].tolist():
            reasons[row] = self.wording
        reason = pa.array(reasons, pa.string())
        # a dropped document keeps its text, for the report
        return pc.if_else(pc.is_null(reason), remaining, texts), reason

    def _bounds_of(self, rows: np.ndarray) -> np.ndarray:
        """The spans of documents, (P, 2) int64, one document after the other. Those between them are read over: the
        documents of a batch are near each other, and a read from object storage costs more than what it reads."""
        first, last = self.offsets[rows.min()], self.offsets[rows.max() + 1]
        data = read_range(self.bounds, int(first) * _BOUNDS.itemsize, int(last) * _BOUNDS.itemsize)
        here = np.frombuffer(data, dtype=_BOUNDS)
        spans = np.concatenate([here[self.offsets[row] - first : self.offsets[row + 1] - first] for row in rows.tolist()])
        return np.stack([spans["start"], spans["end"]], axis=1).astype(np.int64)


class SpanCollector:
    """Takes spans in any order and leaves them on disk by document, merged, without what is protected."""

    def __init__(self, corpus: Corpus, scratch: Path) -> None:
        self._corpus = corpus
        self._scratch = scratch
        self._parts = Parts(scratch / "spans", span_type(corpus), _PARTS)

    def add(self, spans: np.ndarray) -> None:
        """Add records of `span_type`. Those of the earlier corpus are left out."""
        spans = spans[spans["number"] >= self._corpus.first]
        rows = self._corpus.rows_of(spans["number"].astype(np.int64))
        spans["number"] = rows
        # by ranges of rows, so that the parts in sequence are in the order of ids
        self._parts.add(spans, rows * _PARTS // len(self._corpus))

    def close(self, wording: str, least_words: int) -> SpanRemovals:
        """All spans as `SpanRemovals`, whose file in the scratch folder, a new one, has to stay as long as they are used."""
        rows, counts = [], []
        with self._parts, tempfile.NamedTemporaryFile(dir=self._scratch, suffix=".spans", delete=False) as stream:
            for spans in self._parts:
                order = np.lexsort((spans["end"], spans["start"], spans["keep"], spans["number"]))
                merged = _merged(*(spans[name][order].astype(np.int64) for name in ("number", "start", "end", "keep")))
                present, count = np.unique(merged[:, 0], return_counts=True)
                rows.append(present)
                counts.append(count)
                records = np.empty(len(merged), dtype=_BOUNDS)
                records["start"], records["end"] = merged[:, 1], merged[:, 2]
                stream.write(records.data.cast("B") if len(records) else b"")
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        return SpanRemovals(wording, self._corpus.ids[np.concatenate(rows)], offsets, Path(stream.name), least_words)


@compiled_allocating
def _merged(numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Spans of each document united, less the spans to keep.

    (P,) int64 each, sorted by (number, keep, start). Returns (Q, 3) int64: number, start, end; sorted and apart.
    """
    # a span to keep splits a span to cut in two at most
    spans = np.empty((2 * len(numbers), 3), dtype=np.int64)
    count = 0
    first = 0
    while first < len(numbers):
        number = numbers[first]
        last = first
        while last < len(numbers) and numbers[last] == number:
            last += 1
        kept = first
        while kept < last and keep[kept] == 0:
            kept += 1
        # the first span to keep that does not end before the current span
        protected = kept
        index = first
        while index < kept:
            start, end = starts[index], ends[index]
            index += 1
            while index < kept and starts[index] <= end:
                end = max(end, ends[index])
                index += 1
            while protected < last and ends[protected] <= start:
                protected += 1
            here = protected
            while start < end:
                while here < last and ends[here] <= start:
                    here += 1
                until = min(end, starts[here]) if here < last else end
                if until > start:
                    spans[count, 0], spans[count, 1], spans[count, 2] = number, start, until
                    count += 1
                start = max(until, ends[here]) if here < last else end
        first = last
    return spans[:count]


def cut(texts: Texts, bounds: np.ndarray, offsets: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Texts without the spans, and how many words each has left.

    bounds (P, 2) int64: bytes from a text's beginning, those of one text ascending and apart; offsets (N + 1,): whose is whose.
    Where a span was, blanks are not doubled and at most one empty line stays. Texts without spans stay byte for byte.
    """
    sizes = np.diff(texts.offsets)
    data = np.empty(int(sizes.sum()), dtype=np.uint8)
    ends = np.zeros(len(texts) + 1, dtype=np.int64)
    words = np.zeros(len(texts), dtype=np.int64)
    _cut(texts.data, texts.offsets, bounds, offsets, fold_table("exact"), data, ends, words)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(data[: ends[-1]])]
    return pa.Array.from_buffers(pa.large_string(), len(texts), buffers).cast(pa.string()), words


_NEWLINE, _SPACE, _TAB = ord("\n"), ord(" "), ord("\t")


@compiled
def _closed(data: np.ndarray, position: int, stop: int, out: np.ndarray, begin: int, size: int) -> tuple[int, int]:
    """A seam between `out[begin:size]` and `data[position:stop]` without white space that would be doubled: both new places."""
    if position == stop or data[position] == _NEWLINE:
        while size > begin and (out[size - 1] == _SPACE or out[size - 1] == _TAB):
            size -= 1
        if position < stop and size > begin and out[size - 1] == _NEWLINE:
            # the cut took a whole line; this is its line break
            position += 1
    # at a text's beginning: where the first remaining line begins; its indentation stays
    line = position
    while position < stop and is_white(data[position]):
        newline = data[position] == _NEWLINE
        if size == begin:
            doubled = True
        elif newline:
            doubled = size > begin + 1 and out[size - 1] == _NEWLINE and out[size - 2] == _NEWLINE
        else:
            doubled = is_white(out[size - 1]) and out[size - 1] != _NEWLINE
        if not doubled:
            break
        position += 1
        if newline:
            line = position
    return size, (line if size == begin and line > 0 and data[line - 1] == _NEWLINE else position)


@compiled_allocating
def _cut(
    data: np.ndarray,
    offsets: np.ndarray,
    bounds: np.ndarray,
    owners: np.ndarray,
    fold: np.ndarray,
    out: np.ndarray,
    ends: np.ndarray,
    words: np.ndarray,
) -> None:
    size = 0
    for text in range(len(offsets) - 1):
        base, stop = offsets[text], offsets[text + 1]
        begin = size
        position = base
        for span in range(owners[text], owners[text + 1]):
            for byte in range(position, base + bounds[span, 0]):
                out[size] = data[byte]
                size += 1
            position = base + bounds[span, 1]
            size, position = _closed(data, position, stop, out, begin, size)
        for byte in range(position, stop):
            out[size] = data[byte]
            size += 1
        if owners[text + 1] > owners[text]:
            while size > begin and is_white(out[size - 1]):
                size -= 1
            words[text] = length_in_words(out, begin, size, fold, count_words(out, begin, size, fold))
        ends[text + 1] = size


def after(corpus: Corpus, removals: Removals) -> Corpus:
    """The corpus without the documents that a method removes, with the texts as it leaves them."""
    documents = corpus.documents

    def stream(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        needed = dict.fromkeys([*columns, "id", *(["text"] if removals.reads_texts else [])])
        for batch in documents(list(needed)):
            rows, reasons = apply([removals], batch)
            yield rows.filter(pc.is_null(reasons)).select(list(columns))

    return corpus.replaced_by(stream)


def apply(methods: Sequence[Removals], rows: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.Array]:
    """Rows with the removals of all methods applied, and why each is dropped: the first reason, or null.

    rows: with `id`, and with `text` where removals read texts. A dropped row's text is what the method before had left. Where
    a text has changed, `text_hash` follows it.
    """
    ids = rows.column("id")
    before = texts = rows.column("text") if "text" in rows.schema.names else pa.nulls(len(rows), pa.string())
    reasons = pa.nulls(len(rows), pa.string())
    for removals in methods:
        changed, reason = removals.apply(ids, texts)
        texts = pc.if_else(pc.is_null(reasons), changed, texts)
        reasons = pc.coalesce(reasons, reason)
    if texts is not before and not texts.equals(before):
        rows = _with_column(rows, "text", texts)
        if "text_hash" in rows.schema.names:
            rows = _with_column(rows, "text_hash", rehashed(before, texts, rows.column("text_hash")))
    return rows, reasons


def _with_column(rows: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    place = rows.schema.get_field_index(name)
    columns = [values if index == place else column for index, column in enumerate(rows.columns)]
    return pa.RecordBatch.from_arrays(columns, schema=rows.schema)
