"""Explanation of one document: what each edit changes, each filter scores, and whether the document would be kept.

Without settings, each edit is applied on its own, and each score is compared with the limits of the presets that have one.
With a recipe's settings the text takes the way of its documents: edits in order, scores, limits, through the functions of the
stages themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.data.config import CleanConfig, SelectConfig
from bessemer.data.corpus.reader import SCHEMA, TRAIN, document_id
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import COMBINED, FILTERS, by_language, column_description, meant_for, preset, preset_names
from bessemer.data.filters.word_model import OpenModel
from bessemer.data.plugins import EVERY_LANGUAGE, LANGUAGE_SCORES, NO_LIMIT, USUAL_LANGUAGE_SCORE, Languages, Limit, MeantFor
from bessemer.data.stages.clean import Edit, cleaned_schema, cleaning, edit, edits, scorer
from bessemer.data.stages.select import check_scores, contamination, selecting
from bessemer.data.text.texts import Texts, hash_text
from bessemer.data.thresholds import lowest_probabilities, rejection_reasons

RECIPE = "recipe"
_SOURCE = "explain"
#: Lines with more words than this are compared as a whole, not by words.
_MOST_WORDS = 2000
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Score:
    """One column: its value, what it means, the limit that holds for it and in which preset, whether it lies inside."""

    column: str
    value: float | str | bool | None
    description: str = ""
    limit: Limit = NO_LIMIT
    preset: str = ""
    passes: bool | None = None


@dataclass(frozen=True)
class TextChange:
    """A span of the text that an edit replaces, from the character `start`, with a few characters of its line around it."""

    start: int
    left: str
    before: str
    after: str
    right: str


@dataclass(frozen=True)
class EditResult:
    """Result of an edit: its counts, its changes, and the edited text."""

    name: str
    counts: Mapping[str, int]
    changes: Sequence[TextChange]
    text: str


@dataclass(frozen=True)
class Explanation:
    """Edits, scores and reasons of one document.

    text: as it was scored. reasons: by preset, or `RECIPE`, the rules that the text breaks; what the recipe would state as
    the reason comes first. is_kept: whether the recipe keeps it; None where there is none.
    """

    text: str
    edits: Sequence[EditResult]
    scores: Sequence[Score]
    reasons: Mapping[str, Sequence[str]]
    is_kept: bool | None


def explain(text: str, *, url: str | None = None) -> Explanation:
    """Every edit and score that there is, on this text as it is, and on its address. Without an address, the scores that read
    one have no value."""
    texts = Texts.of([text])
    changed = [_edited(edit(name), texts) for name in EDITS]
    counts = {name: pa.array([count]) for one in changed for name, count in one.counts.items()}
    scores, reasons = _with_limits(_scored({"text": text, "url": url}), counts)
    by_column = {one.column: one for one in scores}
    columns = [column for name in FILTERS for column in scorer(name).columns]
    every = [by_column.get(column) or Score(column, None, column_description(column)) for column in columns]
    return Explanation(text, changed, every, reasons, None)


def explain_address(url: str) -> Explanation:
    """Every score that there is of an address, without the page that it leads to."""
    return Explanation("", [], *_with_limits(_scored({"url": url}), {}), None)


def _with_limits(
    scored: Mapping[str, pa.Array], counts: Mapping[str, pa.Array]
) -> tuple[list[Score], dict[str, Sequence[str]]]:
    """Scores with the limits of the presets that have one, and by preset the limits that are broken. counts: of edits."""
    columns = {**scored, **counts}
    limits: dict[str, dict[str, Limit]] = {}
    tongue: str = columns["language"][0].as_py() if "language" in columns else ""
    if "language" in columns:
        limits["language"] = {"language_score": (LANGUAGE_SCORES.get(tongue, USUAL_LANGUAGE_SCORE), None)}
    limits |= {
        name: {column: by_language(column).get(tongue, limit) for column, limit in of_preset.items()}
        for name in preset_names()
        if name not in COMBINED and (of_preset := preset(name))
    }
    homes = {column: (name, limit) for name, of_preset in limits.items() for column, limit in of_preset.items()}
    # leaves out limits on columns without a score, and those not meant for the text's language
    homes = {column: home for column, home in homes.items() if column in columns and _is_meant(meant_for(column), columns)}
    limits = {
        name: {column: limit for column, limit in of_preset.items() if column in homes} for name, of_preset in limits.items()
    }
    broken = {name: _broken(columns, of_preset, Languages()) for name, of_preset in limits.items()}
    reasons: dict[str, Sequence[str]] = {name: rules for name, rules in broken.items() if rules}
    scores = [_score(column, values[0].as_py(), *homes.get(column, ("", NO_LIMIT))) for column, values in scored.items()]
    return scores, reasons


def explain_with(
    text: str,
    clean: CleanConfig | None,
    select: SelectConfig | None,
    folder: Path = Path(),
    *,
    url: str | None = None,
    open_model: OpenModel | None = None,
) -> Explanation:
    """The way that a recipe's documents take: its edits in turn, its scores on what they leave, its limits.

    folder: where the settings' own files lie. open_model: opens a language model for `perplexity`. Duplicates are not looked
    for: they are no property of one document. Raises ConfigError for a limit on a score that `clean` does not compute, or a
    function of the user's that fails.
    """
    edited, texts = [], Texts.of([text])
    for step in edits(clean, folder) if clean else ():
        edited.append(_edited(step, texts))
        texts = Texts.of([edited[-1].text])
    rows = _document(text, url)
    reasons: list[str] = []
    if clean is not None:
        schema = cleaned_schema(clean, SCHEMA, folder, open_model)
        rows = cleaning(clean, schema, folder, open_model)(rows)
        reasons += _stated(rows)
        rows = rows.select(schema.names)
    limits: dict[str, Limit] = {}
    if select is not None and not reasons:
        check_scores(select, rows.schema.names)
        columns = {name: rows.column(name) for name in rows.schema.names}
        scopes, languages, own = select.meant_for(), select.language_limits(), select.limits_by_language()
        tongue = columns["language"][0].as_py()
        limits = {
            column: own.get(column, {}).get(tongue, limit)
            for column, limit in select.limits().items()
            if _is_meant(scopes.get(column, EVERY_LANGUAGE), columns)
        }
        first = _stated(selecting(select, contamination(select, folder))(rows))
        reasons += [*first, *(reason for reason in _broken(columns, limits, languages) if reason not in first)]
        if languages:
            lowest = lowest_probabilities(columns["language"], languages)[0].as_py()
            limits |= {} if lowest is None else {"language_score": (lowest, None)}
    counts = {column for one in edited for column in one.counts}
    scores = [
        _score(name, rows.column(name)[0].as_py(), "", limits.get(name, NO_LIMIT))
        for name in rows.schema.names
        if (name not in SCHEMA.names or (name == "language" and clean is not None and "language" in clean.score))
        and name not in counts
    ]
    is_kept = None if clean is None and select is None else not reasons
    return Explanation(rows.column("text")[0].as_py(), edited, scores, {RECIPE: reasons} if reasons else {}, is_kept)


def changes(before: str, after: str, *, around: int = 30) -> list[TextChange]:
    """The replaced spans: lines are compared first, then the words of the lines that differ."""
    replacements = []
    for start, end, new in _replaced(before, after):
        left, right = before[max(start - around, 0) : start], before[end : end + around]
        replacements.append(TextChange(start, left.rpartition("\n")[2], before[start:end], new, right.partition("\n")[0]))
    return replacements


def _replaced(before: str, after: str) -> Iterator[tuple[int, int, str]]:
    """Begin and end of each span of `before` that differs in `after`, and its text there."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    starts = [0]
    for line in old:
        starts.append(starts[-1] + len(line))
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        words, others = _WORDS.findall("".join(old[i:j])), _WORDS.findall("".join(new[k:m]))
        if tag != "replace" or len(words) + len(others) > _MOST_WORDS:
            yield starts[i], starts[j], "".join(new[k:m])
            continue
        place, reached = starts[i], 0
        for kind, a, b, c, d in difflib.SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
            place += sum(map(len, words[reached:a]))
            end = place + sum(map(len, words[a:b]))
            if kind != "equal":
                yield place, end, "".join(others[c:d])
            place, reached = end, b


def _edited(step: Edit, texts: Texts) -> EditResult:
    before = texts.array[0].as_py()
    edited, counts = step.function(texts)
    after = edited[0].as_py()
    return EditResult(
        step.name, {column: values[0].as_py() for column, values in counts.items()}, changes(before, after), after
    )


def _scored(document: Mapping[str, str | None]) -> dict[str, pa.Array]:
    """The scores of every filter that reads a column of the document, as the stage `clean` gives it that column."""
    texts = {column: Texts.of([value]) for column, value in document.items() if value is not None}
    usable = [one for name in FILTERS if (one := scorer(name)).reads in texts]
    return {column: values for one in usable for column, values in one.function(texts[one.reads]).items()}


def _score(column: str, value: Any, where: str, limit: Limit) -> Score:
    passes = None
    if limit != NO_LIMIT:
        figures = pa.array([None if value is None else float(value)], pa.float64())
        passes = not _broken({column: figures}, {column: limit}, Languages())
    return Score(column, value, column_description(column), limit, where, passes)


def _is_meant(scope: MeantFor, columns: Mapping[str, pa.Array]) -> bool:
    """Whether a limit is meant for the language of the one document that there is."""
    return not scope or bool(scope.holds_for(columns["language"])[0].as_py())


def _broken(columns: Mapping[str, pa.Array], limits: Mapping[str, Limit], languages: Languages) -> list[str]:
    """Every rule that a document breaks, in the order of the rules; of those on languages the first."""
    of_language = rejection_reasons(columns, {}, languages)[0].as_py() if languages else None
    reasons = [of_language] if of_language else []
    for column, limit in limits.items():
        reason = rejection_reasons({column: columns[column]}, {column: limit}, Languages())[0].as_py()
        reasons += [reason] if reason else []
    return reasons


def _stated(rows: pa.RecordBatch) -> list[str]:
    reason = rows.column("reason")[0].as_py()
    return [reason] if reason else []


def _document(text: str, url: str | None) -> pa.RecordBatch:
    row: dict[str, Any] = {field.name: None for field in SCHEMA}
    row |= {"id": document_id(_SOURCE, text), "text": text, "text_hash": hash_text(text), "source": _SOURCE, "url": url}
    row |= {"split": TRAIN, "metadata": []}
    return pa.RecordBatch.from_pylist([row], schema=SCHEMA)
