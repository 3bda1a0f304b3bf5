"""How the scores of all documents lie beside their limits: what `select` shows of each threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.documents import iterate_documents
from bessemer.data.thresholds import Limit

_BINS = 40
_ROWS_AT_ONCE = 1 << 16


def beside_limits(
    folders: Sequence[Path], limits: Mapping[str, Limit], languages: Sequence[str], ranges: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """For each column with a limit, a histogram that is cut at its limits, over the documents of all folders.

    ranges: `low` and `high` of a column, between which bins are of equal width; a limit beyond them ends a bin of its own.
    Returns by column: `lowest`, `highest` (the limit), `low`, `high`, `edges` (E + 1 values) and `counts` (E bins, each
    wholly kept or wholly dropped), how many lie `below` and `above` the bins, `documents` (all), `outside` (those that
    break this limit: a score that is missing or no number does, and is in no bin) and `alone` (those that break no other
    and are in `languages`: what would come back without it). Only the columns are read, never texts.
    """
    columns = [column for column, limit in limits.items() if limit != (None, None)]
    spans = {column: (ranges[column]["low"], ranges[column]["high"]) if column in ranges else (0.0, 1.0) for column in columns}
    edges = {column: _edges(limits[column], *spans[column]) for column in columns}
    counts = {column: np.zeros(len(edges[column]) + 1, np.int64) for column in columns}
    outside, alone, documents = dict.fromkeys(columns, 0), dict.fromkeys(columns, 0), 0
    wanted = [*columns, *(["language"] if languages and columns else [])]
    for folder in folders if columns else ():
        for batch in iterate_documents(folder, wanted, batch_rows=_ROWS_AT_ONCE):
            documents += batch.num_rows
            broken = np.zeros((len(columns) + 1, batch.num_rows), dtype=bool)
            if languages:
                known = pc.is_in(pc.fill_null(batch.column("language"), ""), pa.array(list(languages)))
                broken[-1] = ~known.to_numpy(zero_copy_only=False)
            for row, column in enumerate(columns):
                values = pc.fill_null(pc.cast(batch.column(column), pa.float64()), np.nan).to_numpy(zero_copy_only=False)
                broken[row] = ~_within(values, limits[column])
                # an edge is the first value of the bin on its right; NaN has no place
                places = np.searchsorted(edges[column], values[~np.isnan(values)], side="right")
                counts[column] += np.bincount(places, minlength=len(counts[column]))
            once = broken.sum(0) == 1
            for row, column in enumerate(columns):
                outside[column] += int(broken[row].sum())
                alone[column] += int((broken[row] & once).sum())
    return {
        column: {
            "lowest": limits[column][0],
            "highest": limits[column][1],
            "low": spans[column][0],
            "high": spans[column][1],
            "edges": edges[column].tolist(),
            "counts": counts[column][1:-1].tolist(),
            "below": int(counts[column][0]),
            "above": int(counts[column][-1]),
            "documents": documents,
            "outside": outside[column],
            "alone": alone[column],
        }
        for column in columns
    }


def _within(values: np.ndarray, limit: Limit) -> np.ndarray:
    lowest, highest = (-np.inf if limit[0] is None else limit[0]), (np.inf if limit[1] is None else limit[1])
    with np.errstate(invalid="ignore"):
        return (values >= lowest) & (values <= highest)


def _edges(limit: Limit, low: float, high: float) -> np.ndarray:
    """Equal steps from `low` to `high`, and cuts at the limits. What is inclusive is: a highest limit is cut behind it.

    A step that all but meets a cut gives way to it, or there would be a bin between them as narrow as their rounding.
    """
    lowest, highest = limit
    cuts = [] if lowest is None else [float(lowest)]
    cuts += [] if highest is None else [float(np.nextafter(highest, np.inf))]
    ends, steps = [low, np.nextafter(high, np.inf)], np.linspace(low, high, _BINS + 1)[1:-1]
    near = [np.isclose(steps, cut, rtol=0, atol=(high - low) * 1e-6) for cut in cuts]
    return np.unique([*ends, *cuts, *steps[~np.any(near, axis=0)]])
