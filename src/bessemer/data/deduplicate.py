"""Stage `deduplicate`: of documents that are the same the one with the smallest id stays, whatever order they came in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.progress import Progress
from bessemer.data.config import DeduplicateConfig
from bessemer.data.documents import document_schema, iterate_documents
from bessemer.data.transform import Change, transform, with_reasons


def deduplicate(
    config: DeduplicateConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents without copies: of those with the same text hash the one with the smallest id stays."""
    copies = _copies(documents) if "exact" in config.methods else {}
    return transform(
        documents,
        out,
        document_schema(documents),
        partial(_dropping, copies),
        "looking for duplicates",
        engine=config.where(),
        progress=progress,
    )


def _copies(documents: Path) -> dict[str, str]:
    """The reason for each document that repeats another: hashes and ids alone are gathered to find out, never texts."""
    columns = [(batch.column("id"), batch.column("text_hash")) for batch in iterate_documents(documents, ["id", "text_hash"])]
    if not columns:
        return {}
    ids, hashes = (np.concatenate([pair[side].to_numpy(zero_copy_only=False) for pair in columns]) for side in (0, 1))
    order = np.lexsort((ids, hashes))
    ids, hashes = ids[order], hashes[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = hashes[1:] != hashes[:-1]
    survivors = ids[np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))]
    return {identity: f"duplicate of {survivor}" for identity, survivor in zip(ids[~first], survivors[~first], strict=True)}


def _dropping(reasons: dict[str, str]) -> Change:
    ids, said = pa.array(list(reasons), pa.string()), pa.array(list(reasons.values()), pa.string())

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        return with_reasons(batch, said.take(pc.index_in(batch.column("id"), ids)))

    return change
