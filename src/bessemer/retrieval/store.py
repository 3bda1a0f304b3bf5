"""The passages of an index: rows and vectors in LanceDB, and an index of their words (BM25, `word_index.py`) beside them.

A store is built once and then only read. An update builds another one (`index.py`), so readers never see an incomplete one, and
the statistics of words are never out of date. Scores of BM25 order the hits of one query; they do not compare between queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from bessemer.core.environment import install_advice
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.retrieval.chunks import Box
from bessemer.retrieval.word_index import WordIndex, build_word_index

_TABLE = "passages"
#: Rows above which vectors are searched through an approximate index; below, all are compared.
APPROXIMATE_ABOVE = 100_000
#: Candidates of an approximate index for each wanted hit, which are compared by their whole vectors: its own distances are of
#: codes.
_REFINED = 4
#: Rows of a batch that is written or read.
ROWS_AT_ONCE = 4096
#: Folder of the index of words, beside the rows.
_WORDS = "words"
#: Filters whose rows are remembered.
_FILTERS = 16
#: What stands between the headings of a passage, the outermost first.
HEADINGS_BETWEEN = " › "


class Segment(NamedTuple):
    """Characters `text_start` to `text_end` of a passage's text, which stand in its document from the byte `start` on."""

    text_start: int
    text_end: int
    start: int


class PassagePlace(NamedTuple):
    """Where a passage stands in its document: its number, its headings, and its bytes."""

    number: int
    headings: str
    start: int
    end: int


@dataclass(frozen=True)
class Passage:
    """A passage of a document, as it is stored.

    id: unique in the index. document: its place, as its source names it. number: of the passage in the document. start, end:
    bytes in the document's UTF-8. groups: who may see it, by their names; empty: everybody. table_header: of the table inside
    which the text begins. page: of the document's file, from 1, and box: on this page (`chunks.Box`); None where they are not
    known. segments: of a text that is joined of several passages (`sections.py`), the parts that stand in the document;
    none: all of it stands there from `start` on. They are not stored.
    """

    id: str
    document: str
    number: int
    title: str
    headings: str
    text: str
    start: int
    end: int
    source: str
    url: str = ""
    groups: tuple[str, ...] = ()
    table_header: str = ""
    page: int | None = None
    box: Box | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def parts(self) -> Sequence[Segment]:
        """The parts of the text that stand in the document, in order."""
        return self.segments or (Segment(0, len(self.text), self.start),)

    @property
    def shown(self) -> str:
        """Title, headings and text, as a model reads them and a vector is made of."""
        above = HEADINGS_BETWEEN.join(part for part in (self.title, self.headings) if part)
        return "\n".join(part for part in (above, self.table_header, self.text) if part)


@dataclass(frozen=True)
class Found:
    """A passage with its rank, from 1, and its score in each search that found it: `words` (BM25), `meaning` (cosine)."""

    passage: Passage
    ranks: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Filter:
    """Which passages are searched. documents: places, each whole or with a `*` at its end. groups: those of the principal, who
    sees their passages and those of no group; None: all passages, restricted ones too."""

    documents: Sequence[str] = ()
    sources: Sequence[str] = ()
    groups: frozenset[str] | None = None


#: All passages, restricted ones too.
EVERYTHING = Filter()


class PassageStore(Protocol):
    """Passages that can be searched."""

    def by_words(self, query: str, count: int, where: Filter) -> list[Found]: ...

    def by_meaning(self, vector_D: np.ndarray, count: int, where: Filter) -> list[Found]: ...

    def of_document(self, document: str, numbers: Sequence[int]) -> list[Passage]: ...

    def places_of(self, document: str) -> list[PassagePlace]: ...


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError:
        raise ConfigError(f"an index of documents: {install_advice('lancedb')}") from None
    return lancedb


class LanceStore:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtefactError where the folder holds no whole store."""
        self._folder = folder
        try:
            self._table = _lancedb().connect(str(folder)).open_table(_TABLE)
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ArtefactError(f"{folder}: the passages of this index cannot be opened: {reason}") from None
        names = self._table.schema.names
        if missing := [name for name in _COLUMNS if name not in names and name not in _LATER_COLUMNS]:
            raise ArtefactError(f"{folder}: the passages of this index have no {missing[0]}; index the documents again")
        self._columns = [name for name in _COLUMNS if name in names]
        self._allowed: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._table.count_rows())

    @property
    def has_words(self) -> bool:
        """Whether there is a whole index of words, with the terms of this version; versions until December 2026 made none."""
        try:
            return self.words.is_current
        except ArtefactError:
            return False

    @cached_property
    def words(self) -> WordIndex:
        """The index of words. Raises ArtefactError where it is missing or of other passages."""
        words = WordIndex(self._folder / _WORDS)
        if words.size != len(self):
            raise ArtefactError(f"{self._folder}: its words are those of other passages; index the documents again")
        return words

    def by_words(self, query: str, count: int, where: Filter = EVERYTHING) -> list[Found]:
        """The passages with the words of a query, the best by BM25 first."""
        rows, scores = self.rank_words(query, count, where)
        passages = self._passages_at(rows)
        return [
            Found(passages[row], {"words": rank}, {"words": score})
            for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), start=1)
        ]

    def rank_words(self, query: str, count: int, where: Filter = EVERYTHING) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of rows with the words of a query, and their scores by BM25, the best first."""
        return self.words.rank(query, count, self._rows_within(where))

    def by_meaning(self, vector_D: np.ndarray, count: int, where: Filter = EVERYTHING) -> list[Found]:
        """The passages whose vectors are nearest to one, by their cosine."""
        search = self._table.search(vector_D.astype(np.float32), vector_column_name="vector").distance_type("cosine")
        if self._is_approximate:
            search = search.refine_factor(_REFINED)
        return [
            Found(_passage(row), {"meaning": rank}, {"meaning": 1 - row["_distance"]})
            for rank, row in enumerate(self._rows(search, count, where, "_distance"), start=1)
        ]

    @cached_property
    def _is_approximate(self) -> bool:
        return any(index.columns == ["vector"] for index in self._table.list_indices())

    def of_document(self, document: str, numbers: Sequence[int]) -> list[Passage]:
        """Passages of a document by their numbers, in order."""
        wanted = ", ".join(str(int(number)) for number in numbers)
        if not wanted:
            return []
        condition = f"document = {_quoted(document)} AND number IN ({wanted})"
        rows = self._table.search().where(condition).limit(len(numbers)).select(self._columns).to_list()
        return sorted(map(_passage, rows), key=lambda passage: passage.number)

    def places_of(self, document: str) -> list[PassagePlace]:
        """Where all passages of a document stand, in order."""
        search = self._table.search().where(f"document = {_quoted(document)}")
        rows = search.select(list(PassagePlace._fields)).limit(len(self)).to_list()
        return sorted(PassagePlace(*(row[name] for name in PassagePlace._fields)) for row in rows)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, some at a time; of an index of an earlier version without its later columns."""
        names = self._table.schema.names
        yield from self._table.search().select([name for name in columns if name in names]).to_batches(ROWS_AT_ONCE)

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order of their rows."""
        for batch in self.batches(_COLUMNS):
            yield from map(_passage, batch.to_pylist())

    def _passages_at(self, rows: np.ndarray) -> dict[int, Passage]:
        """The passages of some rows, by their numbers."""
        if not len(rows):
            return {}
        places = np.sort(rows).tolist()
        found = self._table.take_offsets(places).select(self._columns).to_list()
        return dict(zip(places, map(_passage, found), strict=True))

    def _rows_within(self, where: Filter) -> np.ndarray | None:
        """(N,) bool: the rows that a filter leaves; None: all."""
        condition = _condition(where)
        if not condition:
            return None
        allowed = self._allowed.get(condition)
        if allowed is None:
            found = self._table.search().where(condition).select([]).with_row_id(True).to_arrow()["_rowid"].to_numpy()
            allowed = np.isin(self._row_ids, found)
            if len(self._allowed) >= _FILTERS:
                self._allowed.clear()
            self._allowed[condition] = allowed
        return allowed

    @cached_property
    def _row_ids(self) -> np.ndarray:
        """LanceDB's identity of each row, in the order in which rows are read."""
        ids: np.ndarray = self._table.search().select([]).with_row_id(True).to_arrow()["_rowid"].to_numpy()
        return ids

    def _rows(self, search: Any, count: int, where: Filter, score: str) -> list[dict[str, Any]]:
        condition = _condition(where)
        if condition:
            search = search.where(condition, prefilter=True)
        found: list[dict[str, Any]] = search.select([*self._columns, score]).limit(count).to_list()
        return found


_COLUMNS = ["id", "document", "number", "title", "headings", "text", "start", "end", "source", "url", "groups"]
#: What indexes of earlier versions have not: optional parts of a passage.
_LATER_COLUMNS = ["table_header", "page", "box"]
_COLUMNS += _LATER_COLUMNS


def _passage(row: Mapping[str, Any]) -> Passage:
    values = {name: row[name] for name in _COLUMNS if name in row}
    values["table_header"] = values.get("table_header") or ""
    values["box"] = tuple(round(side, 1) for side in values.get("box") or ()) or None
    return Passage(**{**values, "groups": tuple(values["groups"] or ())})


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _condition(where: Filter) -> str:
    """The filter in SQL."""
    conditions = []
    if where.documents:
        kinds = [
            f"starts_with(document, {_quoted(name[:-1])})" if name.endswith("*") else f"document = {_quoted(name)}"
            for name in where.documents
        ]
        conditions.append(f"({' OR '.join(kinds)})")
    if where.sources:
        conditions.append(f"source IN ({', '.join(map(_quoted, where.sources))})")
    if where.groups is not None:
        allowed = ", ".join(map(_quoted, sorted(where.groups)))
        own = f" OR array_has_any(groups, [{allowed}])" if allowed else ""
        conditions.append(f"(array_length(groups) IS NULL OR array_length(groups) = 0{own})")
    return " AND ".join(conditions)


def schema(width: int | None) -> pa.Schema:
    """The columns of a store. width: of vectors; None: it has none."""
    fields = [
        *((name, pa.string()) for name in ("id", "document")),
        ("number", pa.int32()),
        *((name, pa.string()) for name in ("title", "headings", "text")),
        *((name, pa.int64()) for name in ("start", "end")),
        *((name, pa.string()) for name in ("source", "url")),
        ("groups", pa.list_(pa.string())),
        ("table_header", pa.string()),
        ("page", pa.int32()),
        ("box", pa.list_(pa.float32())),
        ("content", pa.string()),
    ]
    if width is not None:
        fields.append(("vector", pa.list_(pa.float32(), width)))
    return pa.schema(fields)


class StoreWriter:
    """Writes a store: rows in batches, then its indexes. An unfinished store keeps its rows and is continued."""

    def __init__(self, folder: Path, width: int | None) -> None:
        self._schema = schema(width)
        self._width = width
        self._folder = folder
        database = _lancedb().connect(str(folder))
        begun = _TABLE in database.list_tables().tables
        self._table = database.open_table(_TABLE) if begun else database.create_table(_TABLE, schema=self._schema)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self._schema.names)

    def remove(self, documents: Sequence[str]) -> None:
        """Remove the passages of documents."""
        for first in range(0, len(documents), ROWS_AT_ONCE):
            names = ", ".join(map(_quoted, documents[first : first + ROWS_AT_ONCE]))
            self._table.delete(f"document IN ({names})")

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows so far, some at a time."""
        yield from self._table.search().select(list(columns)).to_batches(ROWS_AT_ONCE)

    def add(self, passages: Sequence[Passage], content: Sequence[str], vectors_ND: np.ndarray | None) -> None:
        """Write whole documents. content: of each passage, the hash of its document."""
        columns: dict[str, Any] = {name: [getattr(one, name) for one in passages] for name in _COLUMNS}
        columns["content"] = list(content)
        if vectors_ND is not None:
            flat = pa.array(vectors_ND.astype(np.float32).reshape(-1))
            columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self._width)
        self._table.add(pa.table(columns, schema=self._schema))

    def copy(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Rows of another store; columns that it has not are empty."""
        for batch in batches:
            if batch.num_rows:
                columns = [
                    batch[one.name].cast(one.type) if one.name in batch.schema.names else pa.nulls(batch.num_rows, one.type)
                    for one in self._schema
                ]
                self._table.add(pa.Table.from_arrays(columns, schema=self._schema))

    def finish(self, expected: Mapping[str, int]) -> None:
        """Build the indexes. expected: the passages of each document. Raises ArtefactError where the stored rows
        differ, or an index does not cover them; StorageError where the disk is full."""
        from lancedb.index import IvfPq

        self._table.optimize()
        found: Counter[str] = Counter()

        def texts() -> Iterator[list[str]]:
            for batch in self.batches(_COLUMNS):
                passages = [_passage(row) for row in batch.to_pylist()]
                found.update(passage.document for passage in passages)
                yield [passage.shown for passage in passages]

        build_word_index(texts(), self._folder / _WORDS)
        if found != Counter(expected):
            wrong = sorted(name for name in found.keys() | expected.keys() if found[name] != expected.get(name, 0))
            raise ArtefactError(f"{wrong[0]}: its passages were not stored whole; build the index again")
        if self._width is not None and found.total() > APPROXIMATE_ABOVE:
            self._table.create_index("vector", config=IvfPq(distance_type="cosine"), replace=True)
        for index in self._table.list_indices():
            if index.num_unindexed_rows:
                raise ArtefactError(f"the index {index.name} leaves out {index.num_unindexed_rows:,} passages; build it again")
