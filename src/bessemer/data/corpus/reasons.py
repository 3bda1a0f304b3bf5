"""Reasons of dropped documents: the column `reason`, null where a document is kept."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

REASON = pa.field("reason", pa.string())


def with_reasons(batch: pa.RecordBatch, reasons: pa.Array) -> pa.RecordBatch:
    """The batch with the reason for each document, null for one that is kept."""
    return batch.append_column(REASON, reasons)


def kept_and_dropped(rows: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The rows without a reason and those with one. Nothing is copied where all are of one kind."""
    reasons = rows.column("reason")
    if reasons.null_count == rows.num_rows:
        return rows, rows.slice(0, 0)
    if not reasons.null_count:
        return rows.slice(0, 0), rows
    return rows.filter(pc.is_null(reasons)), rows.filter(pc.is_valid(reasons))
