"""Thresholds applied to score columns: the reason why a document is dropped, or null."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.plugins import Limit
from bessemer.data.thresholds.languages import EVERY_LANGUAGE, Languages, MeantFor

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
        """Say it of the rows that fail a rule and none before."""
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
    # a language that is not among them, or unknown, has the last
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
