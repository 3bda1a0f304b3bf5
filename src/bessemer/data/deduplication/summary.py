"""Summary of a method's duplicates for the report: sizes of clusters, and examples with their texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.deduplication.corpus import Corpus, write_ids
from bessemer.data.deduplication.removals import DuplicateRemovals

_EXAMPLE_CHARACTERS = 600
_MEMBERS = 3


def summarise(corpus: Corpus, duplicates: DuplicateRemovals, *, examples: int = 5) -> dict[str, Any]:
    """Counts of clusters (a survivor and all that it replaced) by size, and the largest clusters with texts.

    `clusters`, `documents` (dropped), `by_size`: rows of `from`, `to` (a size doubles from row to row), `clusters` and
    `documents`; `largest`: clusters by falling size, then by the survivor's id, each with `id`, `size`, `text` and some
    `members`, of which `id`, `text`, and `similarity` where it is known; the least similar are shown.
    """
    survivors, clusters, dropped = np.unique(duplicates.survivors, axis=0, return_inverse=True, return_counts=True)
    clusters = clusters.reshape(-1)
    sizes = dropped + 1
    largest = np.argsort(-sizes, kind="stable")[:examples]
    shown = [_least_similar(duplicates, np.flatnonzero(clusters == cluster)) for cluster in largest]
    names = write_ids(survivors[largest])
    members = [write_ids(duplicates.dropped[rows]) for rows in shown]
    texts = _texts(corpus, [*names, *(name for row in members for name in row)])
    return {
        "clusters": len(survivors),
        "documents": len(duplicates),
        "by_size": _by_size(sizes),
        "largest": [
            {
                "id": name,
                "size": int(sizes[cluster]),
                "text": texts.get(name),
                "members": [
                    {"id": member, "text": texts.get(member)}
                    | (
                        {}
                        if np.isnan(duplicates.similarities[row])
                        else {"similarity": round(float(duplicates.similarities[row]), 4)}
                    )
                    for member, row in zip(members[index], shown[index], strict=True)
                ],
            }
            for index, (cluster, name) in enumerate(zip(largest, names, strict=True))
        ],
    }


def _by_size(sizes: np.ndarray) -> list[dict[str, int]]:
    rows = []
    start = 2
    while start <= sizes.max(initial=0):
        inside = (sizes >= start) & (sizes < 2 * start)
        if inside.any():
            rows.append(
                {"from": start, "to": 2 * start - 1, "clusters": int(inside.sum()), "documents": int(sizes[inside].sum())}
            )
        start *= 2
    return rows


def _least_similar(duplicates: DuplicateRemovals, rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(duplicates.similarities[rows], kind="stable")][:_MEMBERS]


def _texts(corpus: Corpus, ids: list[str]) -> dict[str, str]:
    """The beginnings of some documents' texts, by id, those of the earlier corpus too."""
    found: dict[str, str] = {}
    wanted = pa.array(ids, pa.string())
    for documents in (corpus.earlier, corpus.documents):
        for batch in documents(["id", "text"]) if documents and ids else ():
            hits = batch.filter(pc.is_in(batch.column("id"), wanted))
            beginnings = pc.utf8_slice_codeunits(hits.column("text"), 0, _EXAMPLE_CHARACTERS)
            found |= dict(zip(hits.column("id").to_pylist(), beginnings.to_pylist(), strict=True))
    return found
