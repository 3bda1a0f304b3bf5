from __future__ import annotations

import math

import pyarrow as pa

from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.stats import PartStats, stage_stats

SCORED = SCHEMA.append(pa.field("mine", pa.float64())).append(pa.field("edit_found", pa.int64()))


def batch(*rows: dict, schema: pa.Schema = SCORED) -> pa.RecordBatch:
    """Documents, given by what matters."""
    usual = {"text": "abc", "text_hash": "h", "source": "web", "split": "train", "metadata": [], "mine": 0.0, "edit_found": 0}
    filled = [{name: (usual | row).get(name) for name in schema.names} for row in rows]
    return pa.RecordBatch.from_pylist(filled, schema=schema)


def dropped(*rows: dict) -> pa.RecordBatch:
    return batch(*rows, schema=SCORED.append(pa.field("reason", pa.string())))


def figures_of(kept: pa.RecordBatch, rejected: pa.RecordBatch | None = None) -> dict:
    stats = PartStats()
    stats.add(kept, rejected)
    return stage_stats([stats.result()])


def identity(number: int) -> str:
    return f"{number:032x}"


def test_licences_and_objections_are_counted_where_they_are_stated():
    rows = [{"license": "MIT"}, {"license": "MIT", "metadata": [("opt_out", "noai")]}, {"metadata": [("page", "3")]}]
    metrics = figures_of(batch(*({"id": identity(n)} | row for n, row in enumerate(rows))))
    assert metrics["by_license"] == {"MIT": {"documents": 2, "bytes": 6}}
    assert metrics["by_opt_out"] == {"noai": {"documents": 1, "bytes": 3}}


def test_scores_are_sampled_from_kept_and_dropped_alike():
    kept = batch(*({"id": identity(2 * n), "mine": 1.0} for n in range(400)))
    gone = dropped(*({"id": identity(2 * n + 1), "mine": 0.0, "reason": "x"} for n in range(400)))
    counts = figures_of(kept, gone)["scores"]["mine"]["counts"]
    assert (counts[0], counts[-1]) == (128, 128)


def test_what_lies_beyond_the_bins_is_counted_apart():
    values = [*(n / 1000 for n in range(249)), 900.0]
    found = figures_of(batch(*({"id": identity(n), "mine": value} for n, value in enumerate(values))))["scores"]["mine"]
    assert found["above"] >= 1 and found["most"] == 900.0 and found["least"] == 0.0
    assert found["below"] + sum(found["counts"]) + found["above"] == 250


def test_scores_that_are_no_numbers_are_left_out_of_the_histogram():
    found = figures_of(batch({"id": identity(0), "mine": math.nan}, {"id": identity(1), "mine": 2.0}))
    assert sum(found["scores"]["mine"]["counts"]) == 1


def test_counts_of_edits_are_added_up_over_batches_and_parts():
    parts = []
    for part in range(2):
        stats = PartStats()
        stats.add(
            batch({"id": identity(part), "edit_found": 2}), dropped({"id": identity(part + 2), "edit_found": 3, "reason": "x"})
        )
        stats.add(batch({"id": identity(part + 4)}))
        parts.append(stats.result())
    metrics = stage_stats(parts)
    assert metrics["counted"] == {"edit_found": {"documents": 4, "total": 10}}
    assert "edit_found" not in metrics["scores"]
