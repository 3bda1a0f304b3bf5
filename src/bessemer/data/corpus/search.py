"""Search in a documents folder: by text, source, reason and score; groups of duplicates; texts that hold a sequence of words.

Parts are read in order, a batch at a time, and a search ends when it has enough or its time has come; what it then knows of the
folder it says. Nothing is indexed: a corpus of a laptop's size is read in seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import RequestError
from bessemer.data.corpus.reader import count_documents, document_schema, find_document, holds_documents, iterate_documents
from bessemer.data.corpus.stats import REASON
from bessemer.data.thresholds import rule_of

_ROWS = 1024
#: Characters shown of a text, around what was searched for.
_SHOWN = 320
_SURVIVOR = r"^(?P<wording>.+) of (?P<survivor>[0-9a-f]{32})(?: \((?P<similarity>[0-9.]+)\))?$"


@dataclass(frozen=True)
class Query:
    """Conditions of a search; empty ones and None do not count. text: anywhere in it, upper and lower case alike.
    rule: why it was dropped, without the figures. column: a score, from low to high."""

    text: str = ""
    source: str = ""
    split: str = ""
    rule: str = ""
    column: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that decide."""
        wanted = (("text", self.text), ("source", self.source), ("split", self.split), (REASON.name, self.rule))
        return [*(name for name, value in wanted if value), *([self.column] if self.column else [])]

    def matches(self, rows: pa.RecordBatch) -> pa.Array:
        """The rows that meet all conditions, as booleans."""
        mask = pa.array([True] * rows.num_rows)
        if self.text:
            mask = pc.and_(mask, pc.match_substring(rows.column("text"), self.text, ignore_case=True))
        for name, value in (("source", self.source), ("split", self.split)):
            if value:
                mask = pc.and_(mask, pc.equal(rows.column(name), value))
        if self.rule:
            different = rows.column(REASON.name).dictionary_encode()
            right = pa.array([rule_of(reason) == self.rule for reason in different.dictionary.to_pylist()], pa.bool_())
            mask = pc.and_(mask, pc.fill_null(right.take(different.indices), False))
        if self.column:
            values = pc.cast(rows.column(self.column), pa.float64(), safe=False)
            for limit, is_within in ((self.low, pc.greater_equal), (self.high, pc.less_equal)):
                if limit is not None:
                    mask = pc.and_(mask, pc.fill_null(is_within(values, limit), False))
        return mask


@dataclass(frozen=True)
class SearchResult:
    """Documents that were found, their texts cut to a part. next: where a search for more begins; None at the end. looked_at:
    how many documents were, of how many."""

    rows: list[dict[str, Any]]
    next: int | None
    looked_at: int
    documents: int


def search(folder: Path, query: Query, *, start: int = 0, limit: int = 50, seconds: float = 3.0) -> SearchResult:
    """Documents of a folder from the `start`th on, in the order of their ids, until there are `limit` or the time has come.
    Raises ArtefactError for a folder that is none, RequestError for a column that it has not."""
    _check(folder, query)
    documents, until, place = count_documents(folder), time.monotonic() + seconds, start
    rows: list[dict[str, Any]] = []
    for batch in iterate_documents(folder, batch_rows=_ROWS, skip=start):
        hits = pc.indices_nonzero(query.matches(batch))
        wanted = hits[: limit - len(rows)]
        rows += [_shown(row, query.text) for row in batch.take(wanted).to_pylist()]
        if len(rows) >= limit and len(hits):
            place += wanted[-1].as_py() + 1
            break
        place += batch.num_rows
        if time.monotonic() > until:
            break
    return SearchResult(rows, place if place < documents else None, place - start, documents)


def ranked(
    folder: Path, query: Query, order: str, *, descending: bool, start: int = 0, limit: int = 50, seconds: float = 3.0
) -> SearchResult:
    """As `search`, in the order of a score. All documents are looked at, as far as the time goes. Raises as `search`."""
    _check(folder, query, order)
    documents, until, looked_at = count_documents(folder), time.monotonic() + seconds, 0
    best: pa.Table | None = None
    columns = list(dict.fromkeys(["id", order, *query.columns]))
    for batch in iterate_documents(folder, columns, batch_rows=_ROWS):
        rows = batch.filter(query.matches(batch))
        looked_at += batch.num_rows
        keys = pa.table({"id": rows.column("id"), "key": pc.cast(rows.column(order), pa.float64(), safe=False)})
        keys = keys.filter(pc.is_finite(pc.fill_null(keys.column("key"), float("nan"))))
        best = keys if best is None else pa.concat_tables([best, keys])
        chosen = pc.select_k_unstable(
            best, min(start + limit + 1, len(best)), [("key", "descending" if descending else "ascending"), ("id", "ascending")]
        )
        best = best.take(chosen)
        if time.monotonic() > until:
            break
    ids = [] if best is None else best.column("id").to_pylist()
    rows_found = [find_document(folder, identity) for identity in ids[start : start + limit]]
    shown = [_shown(row, query.text) for row in rows_found if row is not None]
    return SearchResult(shown, start + limit if len(ids) > start + limit else None, looked_at, documents)


@dataclass
class Facets:
    """Counts of a folder's documents by source, split and reason. is_whole: all were counted; scores: columns to search by."""

    sources: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    scores: list[str] = field(default_factory=list)
    is_whole: bool = True


def facets(folder: Path, *, seconds: float = 3.0) -> Facets:
    """Sources, splits and reasons with their numbers of documents. Raises ArtefactError for a folder that is none."""
    schema = document_schema(folder)
    result = Facets(scores=_score_columns(schema))
    until = time.monotonic() + seconds
    has_reasons = REASON.name in schema.names
    for rows in iterate_documents(folder, ["source", "split", *([REASON.name] if has_reasons else [])]):
        for counter, name in ((result.sources, "source"), (result.splits, "split")):
            counter.update(_counts(rows.column(name)))
        if has_reasons:
            for reason, number in _counts(rows.column(REASON.name)).items():
                result.rules[rule_of(reason)] += number
        if time.monotonic() > until:
            result.is_whole = False
            break
    return result


@dataclass(frozen=True)
class Duplicate:
    """A document that another stands for. wording: what it was found to be; similarity: None where none was measured."""

    id: str
    wording: str
    similarity: float | None


def duplicate_groups(
    folder: Path, *, groups: int = 50, members: int = 20, seconds: float = 10.0
) -> list[tuple[str, int, list[Duplicate]]]:
    """The largest groups of dropped duplicates: the document that stays, how many it stands for, and the likest of them; of
    what was read in that time. folder: of dropped documents. Raises ArtefactError for one that is none."""
    counts: Counter[str] = Counter()
    likest: dict[str, list[Duplicate]] = {}
    until = time.monotonic() + seconds
    for rows in iterate_documents(folder, ["id", REASON.name]):
        parts = pc.extract_regex(rows.column(REASON.name), _SURVIVOR)
        for identity, one in zip(rows.column("id").to_pylist(), parts.to_pylist(), strict=True):
            if one is not None:
                similarity = float(one["similarity"]) if one["similarity"] else None
                counts[one["survivor"]] += 1
                some = likest.setdefault(one["survivor"], [])
                some.append(Duplicate(identity, one["wording"], similarity))
                some.sort(key=lambda one: (-(one.similarity or 1.0), one.id))
                del some[members:]
        if time.monotonic() > until:
            break
    largest = sorted(counts.items(), key=lambda group: (-group[1], group[0]))[:groups]
    return [(survivor, count, likest[survivor]) for survivor, count in largest]


@dataclass(frozen=True)
class Passage:
    """A place in a document: what stands there, with what stands around it; which of the needles it is, by its number."""

    row: dict[str, Any]
    left: str
    found: str
    right: str
    needle: int


def passages(
    folder: Path, needles: Sequence[str], *, split: str | None = None, limit: int = 5, seconds: float = 3.0
) -> tuple[list[Passage], int, int]:
    """Documents that hold a text, those with the longest first: `needles` are its endings, the longest first.

    Every needle ends in the last one, so only that is searched for. One passage of a document. split: of which documents; None:
    of all. Returns them, how many documents were looked at, and how many there are. Raises ArtefactError for a folder that is
    none.
    """
    assert needles and all(longer.endswith(needles[-1]) for longer in needles), needles
    until, looked_at = time.monotonic() + seconds, 0
    best: list[Passage] = []
    for batch in iterate_documents(folder, split=split, batch_rows=_ROWS):
        hits = batch.filter(pc.match_substring(batch.column("text"), needles[-1]))
        looked_at += batch.num_rows
        for row in hits.to_pylist():
            number = next(number for number, needle in enumerate(needles) if needle in row["text"])
            if len(best) < limit or number < best[-1].needle:
                place = row["text"].index(needles[number])
                best.append(_passage(row, place, place + len(needles[number]), number))
                best.sort(key=lambda one: one.needle)
                del best[limit:]
        if time.monotonic() > until or (len(best) == limit and best[-1].needle == 0):
            break
    return best, looked_at, count_documents(folder, split)


def _passage(row: dict[str, Any], start: int, end: int, needle: int) -> Passage:
    text, around = row["text"], _SHOWN // 3
    left, right = text[max(0, start - around) : start], text[end : end + around]
    return Passage({name: value for name, value in row.items() if name != "text"}, left, text[start:end], right, needle)


def _check(folder: Path, query: Query, *scores: str) -> None:
    schema = document_schema(folder)
    for name in query.columns:
        if name not in schema.names:
            raise RequestError(f"these documents have no column {name!r}")
    known = _score_columns(schema)
    for name in (query.column, *scores):
        if name and name not in known:
            raise RequestError(f"these documents have no score {name!r}{nearest(name, known)}")


def _score_columns(schema: pa.Schema) -> list[str]:
    is_score = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    return [one.name for one in schema if any(is_one(one.type) for is_one in is_score)]


def _counts(values: pa.Array) -> dict[str, int]:
    return {str(one["values"]): one["counts"] for one in pc.value_counts(values).to_pylist()}


def _shown(row: dict[str, Any], searched: str) -> dict[str, Any]:
    """A row with the part of its text in which what was searched for stands, or with its beginning."""
    text = row["text"]
    place = text.lower().find(searched.lower()) if searched else 0
    start = max(0, place - _SHOWN // 3)
    return {**row, "text": text[start : start + _SHOWN], "text_start": start, "characters": len(text)}


def sides_of(folder: Path, sides: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The folders below a stage's that hold documents, each with their number."""
    for side in sides:
        if holds_documents(folder / side):
            yield side, count_documents(folder / side)
