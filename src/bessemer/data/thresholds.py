"""Thresholds of score columns: the reason why a document is dropped, or null, and the histogram of a score with its limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.plugins import EVERY_LANGUAGE, Languages, Limit, MeantFor

_DECIMALS = 3
_FIGURES = re.compile(
    r"( of [0-9a-f]{32}( \([0-9.]+\))?|: \w+ [0-9.]+|, item .*| (nan|[-+0-9.e]+) [<>] [-+0-9.e]+)$", re.DOTALL
)
#: Scores whose names are of several words.
_FAMILIES = ("gopher_repetition", "model_written", "personal_data")


def rejection_reasons(
    scores: Mapping[str, pa.Array],
    limits: Mapping[str, Limit],
    languages: Languages,
    meant_for: Mapping[str, MeantFor] | None = None,
    by_language: Mapping[str, Mapping[str, Limit]] | None = None,
) -> pa.Array:
    """Why each document is dropped, as text; null for one that is kept. The first rule that fails is the reason.

    `scores` holds the columns named by `limits`, and `language` and `language_score` where languages are limited. meant_for: by
    column the languages for which its limit is, every one where it is silent; by_language: by column the limits of languages
    that have another. `scores` then holds `language` too. A bound is inclusive. A score that is missing or no number fails its
    rule.
    """
    reasons = pa.nulls(len(next(iter(scores.values()))), pa.string())

    def refuse(failing: pa.Array, label: pa.Array | pa.Scalar, values: pa.Array, comparison: str | pa.Array) -> None:
        """State the reason for rows that fail this rule and none before."""
        nonlocal reasons
        these = pc.and_(failing, pc.is_null(reasons))
        if pc.any(these).as_py():
            some = [part.filter(these) if isinstance(part, pa.Array) else part for part in (label, values, comparison)]
            reasons = pc.replace_with_mask(reasons, these, _said(*some))

    if languages:
        code, probability = pc.fill_null(scores["language"], "unknown"), scores["language_score"]
        if languages.kept:
            label = pc.binary_join_element_wise("language:", code, " ")
            refuse(pc.invert(pc.is_in(code, pa.array(languages.kept))), label, probability, "")
        lowest = lowest_probabilities(code, languages)
        fails = pc.and_(pc.is_valid(lowest), _not(pc.greater_equal, probability, lowest))
        limit = pc.binary_join_element_wise(" <", pc.fill_null(pc.cast(lowest, pa.string()), ""), " ")
        refuse(fails, pa.scalar(display_name("language_score")), probability, limit)
    for column, (lowest, highest) in limits.items():
        label, values = pa.scalar(display_name(column)), scores[column]
        scope = (meant_for or {}).get(column, EVERY_LANGUAGE)
        judged = scope.holds_for(scores["language"]) if scope else pa.scalar(True)
        own = (by_language or {}).get(column, {})
        if lowest is not None:
            bounds, said = _bounds(" <", lowest, {name: low for name, (low, _) in own.items()}, scores)
            refuse(pc.and_(judged, _not(pc.greater_equal, values, bounds)), label, values, said)
        if highest is not None:
            bounds, said = _bounds(" >", highest, {name: high for name, (_, high) in own.items()}, scores)
            refuse(pc.and_(judged, _not(pc.less_equal, values, bounds)), label, values, said)
    return reasons


def _bounds(
    sign: str, usual: float, own: Mapping[str, float | None], scores: Mapping[str, pa.Array]
) -> tuple[float | pa.Array, str | pa.Array]:
    """The bound of each row by its language, and how a reason states it: one value and text where all have the `usual` one."""
    differing = {name: bound for name, bound in own.items() if bound is not None and bound != usual}
    if not differing:
        return usual, f"{sign} {usual:g}"
    bounds = [*differing.values(), usual]
    # other languages, and unknown ones, have the last bound
    places = pc.fill_null(pc.index_in(scores["language"], pa.array(list(differing), pa.string())), len(differing))
    texts = pa.array([f"{sign} {bound:g}" for bound in bounds])
    return pa.array(bounds, pa.float64()).take(places), texts.take(places)


def lowest_probabilities(languages_of_rows: pa.Array, languages: Languages) -> pa.Array:
    """The lowest probability at which each row is in its language, by the rows' languages; null where any will do."""
    lowest = pa.array([languages.usual] * len(languages_of_rows), pa.float64())
    for name, score in languages.lowest.items():
        lowest = pc.if_else(pc.equal(languages_of_rows, name), score, lowest)
    return lowest


def display_name(column: str) -> str:
    """A score column's name as a reason has it: `gopher_mean_word_length` is `gopher: mean word length`."""
    family = next((name for name in _FAMILIES if column.startswith(name + "_")), column.partition("_")[0])
    measure = column[len(family) + 1 :]
    return f"{family.replace('_', ' ')}: {measure.replace('_', ' ')}" if measure else column


def rule_of(reason: str) -> str:
    """A reason without its figures, under which it is counted: `gopher: mean word length 2.1 < 3` becomes
    `gopher: mean word length`, `near duplicate of 3f… (0.87)` becomes `near duplicate`, `language: de 0.93` becomes
    `language`, and `overlap with arc, item 7` becomes `overlap with arc`."""
    return _FIGURES.sub("", reason)


def _not(comparison: object, values: pa.Array, limit: float | pa.Array) -> pa.Array:
    return pc.invert(pc.fill_null(comparison(values, limit), False))  # type: ignore[operator]


def _said(label: pa.Array | pa.Scalar, values: pa.Array, comparison: str | pa.Array) -> pa.Array:
    rounded = pc.round(pc.cast(values, pa.float64()), _DECIMALS)
    figures = pc.fill_null(pc.cast(rounded, pa.string()), "nan")
    return pc.binary_join_element_wise(label, pc.binary_join_element_wise(figures, comparison, ""), " ")


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
        """Whether the limit is for each row, by language."""
        if not self.meant_for:
            return True
        # an unknown language has no limit of its own
        if self.column == _LANGUAGE_SCORE:
            languages_of_rows = pc.fill_null(languages_of_rows, "")
        rows: np.ndarray = self.meant_for.holds_for(languages_of_rows).to_numpy(zero_copy_only=False)
        return rows

    def keeps(self, values: np.ndarray, languages_of_rows: pa.Array | None) -> np.ndarray:
        """Whether each value is within the limit, or within that of the row's language where it has its own."""
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
    """Limits to draw, by name: those on languages first, as they are applied."""
    thresholds = {}
    if languages.usual is not None and not (languages.kept and set(languages.kept) <= languages.lowest.keys()):
        others = MeantFor(but=tuple(languages.lowest))
        thresholds[_LANGUAGE_SCORE] = _Threshold(_LANGUAGE_SCORE, (languages.usual, None), others)
    for name, lowest in languages.lowest.items():
        thresholds[f"{_LANGUAGE_SCORE}_{name}"] = _Threshold(_LANGUAGE_SCORE, (lowest, None), MeantFor(only=(name,)))
    return thresholds | {
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
    """Equal steps from `low` to `high`, and cuts at the limits. What is inclusive is: a highest limit is cut behind it. A step
    that all but meets a cut gives way to it, or there would be a bin between them as narrow as their rounding."""
    lowest, highest = limit
    cuts = [] if lowest is None else [float(lowest)]
    cuts += [] if highest is None else [float(np.nextafter(highest, np.inf))]
    ends, steps = [low, np.nextafter(high, np.inf)], np.linspace(low, high, _BINS + 1)[1:-1]
    near = [np.isclose(steps, cut, rtol=0, atol=(high - low) * 1e-6) for cut in cuts]
    return np.unique([*ends, *cuts, *steps[~np.any(near, axis=0)]])
