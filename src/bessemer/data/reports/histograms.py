"""Histograms of scores beside their limits: what `select` shows of each threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.plugins import Limit
from bessemer.data.thresholds.languages import EVERY_LANGUAGE, Languages, MeantFor

_BINS = 40
_LANGUAGE_SCORE = "language_score"
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class _Threshold:
    """A limit of a score, for the documents of some languages or of every one."""

    column: str
    limit: Limit
    meant_for: MeantFor = EVERY_LANGUAGE
    by_language: Mapping[str, Limit] = field(default_factory=dict)

    def holds_for(self, languages_of_rows: pa.Array | None) -> np.ndarray | bool:
        """Which rows, by their languages, the limit is for."""
        if not self.meant_for:
            return True
        # an unknown language has no limit of its own
        if self.column == _LANGUAGE_SCORE:
            languages_of_rows = pc.fill_null(languages_of_rows, "")
        found: np.ndarray = self.meant_for.holds_for(languages_of_rows).to_numpy(zero_copy_only=False)
        return found

    def keeps(self, values: np.ndarray, languages_of_rows: pa.Array | None) -> np.ndarray:
        """Which values the limit keeps, or that of the row's language where it has another."""
        kept = _within(values, self.limit)
        for language, limit in self.by_language.items() if languages_of_rows is not None else ():
            these = pc.fill_null(pc.equal(languages_of_rows, language), False).to_numpy(zero_copy_only=False)
            if these.any():
                kept[these] = _within(values[these], limit)
        return kept


def beside_limits(
    folders: Sequence[Path],
    limits: Mapping[str, Limit],
    languages: Languages,
    ranges: Mapping[str, Mapping[str, float]],
    meant_for: Mapping[str, MeantFor] | None = None,
    by_language: Mapping[str, Mapping[str, Limit]] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each column with a limit, a histogram that is cut at its limits, over the documents of all folders.

    ranges: `low` and `high` of a column, between which bins are of equal width; a limit beyond them ends a bin of its own.
    meant_for: by column the languages for which a limit is; documents in others are not counted for it. by_language: by column
    the limits of languages that have another: `outside` and `alone` count by these. Where one language is kept, the histogram
    is cut at its limit, else at the usual one.
    Returns by column: `lowest`, `highest` (the limit), `low`, `high`, `edges` (E + 1 values) and `counts` (E bins, each
    wholly kept or wholly dropped), how many lie `below` and `above` the bins, `documents` (all), `outside` (those that
    break this limit: a score that is missing or no number does, and is in no bin) and `alone` (those that break no other
    and are in `languages`: what would come back without it). A language with a limit of its own for `language_score` has a
    histogram of its own, `language_score_de`, over its own documents. Only the columns are read, never texts.
    """
    own = by_language or {}
    if len(languages.kept) == 1:
        limits = {column: own.get(column, {}).get(languages.kept[0], limit) for column, limit in limits.items()}
    thresholds = _thresholds(limits, languages, meant_for or {}, own)
    spans = {name: _span(ranges.get(one.column)) for name, one in thresholds.items()}
    edges = {name: _edges(one.limit, *spans[name]) for name, one in thresholds.items()}
    counts = {name: np.zeros(len(edges[name]) + 1, np.int64) for name in thresholds}
    outside, alone, documents = (dict.fromkeys(thresholds, 0) for _ in range(3))
    by_tongue = bool(languages or meant_for or own)
    wanted = [*dict.fromkeys(one.column for one in thresholds.values()), *(["language"] if by_tongue else [])]
    for folder in folders if thresholds else ():
        for batch in iterate_documents(folder, wanted, batch_rows=_ROWS_AT_ONCE):
            broken = np.zeros((len(thresholds) + 1, batch.num_rows), dtype=bool)
            tongues = batch.column("language") if by_tongue else None
            if languages.kept:
                broken[-1] = ~pc.is_in(pc.fill_null(tongues, ""), pa.array(languages.kept)).to_numpy(zero_copy_only=False)
            for row, (name, one) in enumerate(thresholds.items()):
                values = pc.fill_null(pc.cast(batch.column(one.column), pa.float64()), np.nan).to_numpy(zero_copy_only=False)
                here = np.broadcast_to(one.holds_for(tongues), values.shape)
                broken[row] = here & ~one.keeps(values, tongues)
                # an edge is the first value of the bin on its right; NaN has no place
                places = np.searchsorted(edges[name], values[here & ~np.isnan(values)], side="right")
                counts[name] += np.bincount(places, minlength=len(counts[name]))
                documents[name] += int(here.sum())
            once = broken.sum(0) == 1
            for row, name in enumerate(thresholds):
                outside[name] += int(broken[row].sum())
                alone[name] += int((broken[row] & once).sum())
    return {
        name: {
            "lowest": one.limit[0],
            "highest": one.limit[1],
            "low": spans[name][0],
            "high": spans[name][1],
            "edges": edges[name].tolist(),
            "counts": counts[name][1:-1].tolist(),
            "below": int(counts[name][0]),
            "above": int(counts[name][-1]),
            "documents": documents[name],
            "outside": outside[name],
            "alone": alone[name],
        }
        for name, one in thresholds.items()
    }


def _thresholds(
    limits: Mapping[str, Limit],
    languages: Languages,
    meant_for: Mapping[str, MeantFor],
    by_language: Mapping[str, Mapping[str, Limit]],
) -> dict[str, _Threshold]:
    """What is drawn, by name: the languages' limits first, as they are asked."""
    found = {}
    if languages.usual is not None and not (languages.kept and set(languages.kept) <= languages.lowest.keys()):
        found[_LANGUAGE_SCORE] = _Threshold(_LANGUAGE_SCORE, (languages.usual, None), MeantFor(but=tuple(languages.lowest)))
    for name, lowest in languages.lowest.items():
        found[f"{_LANGUAGE_SCORE}_{name}"] = _Threshold(_LANGUAGE_SCORE, (lowest, None), MeantFor(only=(name,)))
    return found | {
        column: _Threshold(column, limit, meant_for.get(column, EVERY_LANGUAGE), by_language.get(column, {}))
        for column, limit in limits.items()
        if limit != (None, None)
    }


def _span(known: Mapping[str, float] | None) -> tuple[float, float]:
    return (known["low"], known["high"]) if known else (0.0, 1.0)


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
