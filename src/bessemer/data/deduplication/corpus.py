"""Corpus for deduplication: a stream of documents that can be read again, and a number for each document.

A document's number is its rank by preference and then by id, with the documents of an earlier corpus before all others. So
"the smallest number survives" says at once that the best copy stays, of equal ones that with the smallest id, and that what
was there before stays, whatever order the documents come in. Numbers take 4 bytes where ids take 32; what is kept for every
document is the table of ids, 16 bytes each, and 16 more where a preference says another order than that of the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ArtefactError
from bessemer.data.deduplication.preference import Preference
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts

#: Streams the columns asked for, as often as it is called: `partial(iterate_documents, folder)` is one.
Documents = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]

_BYTES_AT_ONCE = 1 << 24
_DIGITS = 32
_NIBBLES = np.full(256, 255, dtype=np.uint8)
_NIBBLES[[ord(digit) for digit in "0123456789abcdef"]] = np.arange(16)


def parse_ids(ids: pa.Array) -> np.ndarray:
    """Ids of 32 hexadecimal digits as numbers, (N, 2) uint64, the high half first. Raises ArtefactError for any other id."""
    texts = Texts.from_arrow(ids)
    if len(texts) and (np.diff(texts.offsets) != _DIGITS).any():
        raise ArtefactError("an id of a document is not 32 hexadecimal digits long")
    nibbles = _NIBBLES[texts.data[texts.offsets[0] : texts.offsets[-1]]].reshape(-1, _DIGITS)
    if (nibbles == 255).any():
        raise ArtefactError("an id of a document is not made of the digits 0-9 and a-f")
    halves = (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).reshape(-1, 2, 8)
    return np.ascontiguousarray(halves).view(">u8").reshape(-1, 2).astype(np.uint64)


def write_ids(halves: np.ndarray) -> list[str]:
    """The other way round: (N, 2) uint64 to strings of 32 digits."""
    return [f"{high:016x}{low:016x}" for high, low in halves.tolist()]


@compiled_allocating
def ranks(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each wanted pair in a sorted table, both (·, 2) uint64; -1 where it is not there."""
    found = np.full(len(wanted), -1, dtype=np.int64)
    for index in range(len(wanted)):
        high, low = wanted[index, 0], wanted[index, 1]
        left, right = 0, len(table)
        while left < right:
            middle = (left + right) // 2
            if table[middle, 0] < high or (table[middle, 0] == high and table[middle, 1] < low):
                left = middle + 1
            else:
                right = middle
        if left < len(table) and table[left, 0] == high and table[left, 1] == low:
            found[index] = left
    return found


@dataclass(frozen=True)
class Corpus:
    """Documents to deduplicate, and perhaps an earlier corpus whose documents count but are never touched.

    `ids` (documents, 2) uint64: the earlier ones first, each part sorted. A document's number is the row of its id, unless
    `numbers` (documents,) int64 says another for each row; `rows` (documents,) int64 is the way back.
    """

    documents: Documents
    earlier: Documents | None
    ids: np.ndarray
    #: How many documents the earlier corpus has, and so the first number of this one.
    first: int
    numbers: np.ndarray | None = None
    rows: np.ndarray | None = None

    @classmethod
    def of(cls, documents: Documents, earlier: Documents | None = None, preference: Preference | None = None) -> Corpus:
        """Read all ids, and what the preference looks at; without one ids alone decide.

        Raises ArtefactError when an id occurs twice in a corpus, or is not one.
        """
        before, now = _sorted_ids(earlier), _sorted_ids(documents)
        corpus = cls(documents, earlier, np.concatenate([before, now]), len(before))
        return corpus if preference is None else corpus._numbered(_by_preference(documents, now, preference))

    def _numbered(self, order: np.ndarray) -> Corpus:
        """With the own documents numbered in this order of their rows."""
        if (order[1:] > order[:-1]).all():
            return replace(self, numbers=None, rows=None)
        rows = np.concatenate([np.arange(self.first), self.first + order])
        numbers = np.empty_like(rows)
        numbers[rows] = np.arange(len(rows))
        return replace(self, numbers=numbers, rows=rows)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def number_type(self) -> np.dtype:
        """The type in which records on disk hold a document's number: 32 bits for as many documents as they can tell apart."""
        return np.dtype("<u4" if len(self) <= 1 << 32 else "<u8")

    def rows_of(self, numbers: np.ndarray) -> np.ndarray:
        """The row in `ids` of each number, in the shape that is given."""
        return numbers if self.rows is None else self.rows[numbers]

    def batches(self, columns: Sequence[str] = ("text",)) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Numbers (N,) int64 and rows of every document, those of the earlier corpus first; columns as Arrow arrays.

        A batch has at most 16 MB of text, unless a single document has more: that bounds what is made of a batch's words.
        """
        wanted = ["id", *columns]
        for documents, start, end in ((self.earlier, 0, self.first), (self.documents, self.first, len(self))):
            for batch in documents(wanted) if documents else ():
                numbers = start + ranks(self.ids[start:end], parse_ids(batch.column("id")))
                if self.numbers is not None:
                    numbers = self.numbers[numbers]
                rows = batch.select(list(columns))
                for first, last in pairwise(_limits(rows)):
                    yield numbers[first:last], rows.slice(first, last - first)

    def texts(self) -> Iterator[tuple[np.ndarray, Texts]]:
        """Numbers and texts of every document."""
        for numbers, batch in self.batches():
            yield numbers, Texts.from_arrow(batch.column("text"))

    def replaced_by(self, documents: Documents) -> Corpus:
        """The same with other documents of its own, in the same order: what a method has left of them."""
        left = _sorted_ids(documents)
        corpus = replace(self, documents=documents, ids=np.concatenate([self.ids[: self.first], left]))
        if self.numbers is None:
            return corpus
        return corpus._numbered(np.argsort(self.numbers[self.first + ranks(self.ids[self.first :], left)]))


def _limits(rows: pa.RecordBatch) -> list[int]:
    """Where to cut a batch: 0, the first row of each further chunk, and the number of rows."""
    if "text" not in rows.schema.names or rows.num_rows == 0:
        return [0, rows.num_rows]
    before = np.concatenate([[0], np.cumsum(pc.binary_length(rows.column("text")).to_numpy(), dtype=np.int64)[:-1]])
    return [0, *(np.flatnonzero(np.diff(before // _BYTES_AT_ONCE)) + 1).tolist(), rows.num_rows]


def _sorted_ids(documents: Documents | None) -> np.ndarray:
    parts = [parse_ids(batch.column("id")) for batch in documents(["id"])] if documents else []
    ids = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)
    ids = ids[np.lexsort((ids[:, 1], ids[:, 0]))]
    repeated = (ids[1:] == ids[:-1]).all(axis=1)
    if repeated.any():
        raise ArtefactError(f"two documents have the id {write_ids(ids[1:][repeated][:1])[0]}")
    return ids


def _by_preference(documents: Documents, ids: np.ndarray, preference: Preference) -> np.ndarray:
    """The order of documents, (N,) int64 rows of their sorted ids, the best first and of equals the smallest id."""
    keys = np.empty((len(ids), len(preference.columns)))
    for batch in documents(["id", *preference.columns]):
        keys[ranks(ids, parse_ids(batch.column("id")))] = preference.keys(batch)
    return np.lexsort((np.arange(len(ids)), *keys.T[::-1]))
