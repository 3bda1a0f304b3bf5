"""Statistics of a folder of documents without a manifest: a copy, or one made with the Python functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.data.corpus.reader import document_files, read_part
from bessemer.data.reports.stage_stats import PartStats, stage_stats


def folder_stats(documents: Path) -> dict[str, Any]:
    """What a stage's metrics would say of a folder of documents and, where it lies beside, of the twin folder `rejected`.

    Raises ArtefactError when the folder holds no documents.
    """
    twin = documents.parent / "rejected"
    rejected = {path.name: path for path in document_files(twin)} if documents.name != "rejected" and twin.is_dir() else {}
    figures = []
    for path in document_files(documents):
        stats = PartStats()
        if path.name in rejected:
            for batch in read_part(rejected[path.name]):
                stats.add(_without_reason(batch).slice(0, 0), batch)
        for batch in read_part(path):
            stats.add(_without_reason(batch))
        figures.append(stats.result())
    return stage_stats(figures)


def _without_reason(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.select([name for name in batch.schema.names if name != "reason"])
