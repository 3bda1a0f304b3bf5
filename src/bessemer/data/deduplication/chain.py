"""One method after the other: what the first leaves is what the next one sees; at the end one reading applies all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.verdicts import Finding
from bessemer.data.text.hashes import hash_texts


def after(corpus: Corpus, finding: Finding) -> Corpus:
    """The corpus without the documents that a finding drops, and with the texts as it leaves them."""
    documents = corpus.documents

    def stream(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        needed = dict.fromkeys([*columns, "id", *(["text"] if finding.reads_texts else [])])
        for batch in documents(list(needed)):
            rows, reasons = apply([finding], batch)
            yield rows.filter(pc.is_null(reasons)).select(list(columns))

    return corpus.replaced_by(stream)


def apply(findings: Sequence[Finding], rows: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.Array]:
    """Rows as all findings leave them, and why each is dropped: the first reason, or null.

    rows: with `id`, and with `text` where a finding reads texts. A dropped row's text is what the method before had left;
    where a text has changed, `text_hash` follows it.
    """
    ids = rows.column("id")
    before = texts = rows.column("text") if "text" in rows.schema.names else pa.nulls(len(rows), pa.string())
    reasons = pa.nulls(len(rows), pa.string())
    for finding in findings:
        changed, found = finding.apply(ids, texts)
        texts = pc.if_else(pc.is_null(reasons), changed, texts)
        reasons = pc.coalesce(reasons, found)
    if texts is not before and not texts.equals(before):
        is_new = pc.not_equal(texts, before)
        rows = _with_column(rows, "text", texts)
        if "text_hash" in rows.schema.names:
            hashes = pa.array(hash_texts(texts.filter(is_new)), pa.string())
            rows = _with_column(rows, "text_hash", pc.replace_with_mask(rows.column("text_hash"), is_new, hashes))
    return rows, reasons


def _with_column(rows: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    place = rows.schema.get_field_index(name)
    columns = [values if index == place else column for index, column in enumerate(rows.columns)]
    return pa.RecordBatch.from_arrays(columns, schema=rows.schema)
