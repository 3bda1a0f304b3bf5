"""Chain of deduplication methods: each reads what the one before leaves; one last reading applies all removals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.corpus.text_hash import rehashed
from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.removals import Removals


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
