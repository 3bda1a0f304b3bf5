"""Transformation of a documents folder part by part: each part is read, changed, and written to kept and rejected parts.

Ids stay what they are, so a row stays in its part and in its place there: nothing is shuffled, memory holds a batch, parts
run side by side, and a killed stage goes on with the parts that it has not finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress, Silent, Speed
from bessemer.core.store import read_json, write_text
from bessemer.data.corpus.reader import count_documents, document_files, read_part
from bessemer.data.corpus.remote import SCRATCH, begin, finish
from bessemer.data.corpus.stats import REASON, PartStats, kept_and_dropped, stage_stats, totals_of
from bessemer.data.corpus.writer import PartWriter
from bessemer.data.engine import Engine, run_tasks

_SIDES = ("documents", "rejected")


@dataclass(frozen=True)
class _Part:
    number: int
    path: Place


#: From a batch to the batch with its new columns and a last column `reason`: null where the document is kept.
Change = Callable[[pa.RecordBatch], pa.RecordBatch]


def transform(
    documents: Path,
    out: Path,
    schema: pa.Schema,
    change: Callable[[], Change],
    description: str,
    *,
    engine: Engine | None = None,
    storage: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `out/documents` and `out/rejected` from a folder of documents, and return the stage's metrics.

    storage: an address on object storage below which the parts are put instead; `out` then holds their index.
    schema: the columns of the kept rows; rejected ones have a `reason` besides. change: called once for each part, where
    the work is done, and gives the function that is called on its batches; it must depend on single rows alone.
    """
    files = document_files(documents)
    parts = [_Part(number, path.absolute() if isinstance(path, Path) else path) for number, path in enumerate(files)]
    place, scratch = begin(storage, out)
    recorded = {record.name for record in scratch.glob("*.json")}
    records = {part.number: _record(scratch, part) for part in parts}
    finished = {number: read_json(record) for number, record in records.items() if record.name in recorded}
    todo = [part for part in parts if part.number not in finished]
    total = count_documents(documents)
    done = sum(totals_of(figures).documents_in for figures in finished.values())
    with (progress or Silent()).task(description, total=total, unit="documents", completed=done) as task:
        speed, seen, kept, read = Speed(), 0, 0, 0
        work = partial(_transform_part, out=place, schema=schema, change=change)
        for number, figures in run_tasks(work, todo, engine):
            finished[todo[number].number] = figures
            totals = totals_of(figures)
            kept, read = kept + totals.documents_out, read + totals.bytes_in
            seen += totals.documents_in
            task.advance(totals.documents_in, note=f"{speed.of(seen, read)} · {kept / max(seen, 1):.0%} kept")
    finish(place, out, _SIDES, [part.path.name for part in parts])
    return stage_stats(finished[part.number] for part in parts)


def _transform_part(part: _Part, out: Place, schema: pa.Schema, change: Callable[[], Change]) -> dict[str, Any]:
    """One part; its figures are also left in the scratch folder, last of all."""
    apply, stats = change(), PartStats()
    documents, dropped = (out / side / part.path.name for side in _SIDES)
    with (
        PartWriter(documents, schema) as kept,
        PartWriter(dropped, schema.append(REASON.with_nullable(False))) as rejected,
    ):
        for batch in read_part(part.path):
            here, gone = kept_and_dropped(apply(batch))
            here = here.select(schema.names)
            stats.add(here, gone, read=batch)
            kept.write(here)
            rejected.write(gone)
    figures = stats.result()
    # the part is not synchronised either
    write_text(_record(out / SCRATCH, part), json.dumps(figures), synchronise=False)
    return figures


def _record(scratch: Place, part: _Part) -> Place:
    return scratch / f"figures-{part.path.stem}.json"
