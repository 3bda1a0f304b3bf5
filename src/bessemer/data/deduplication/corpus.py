"""Corpus for deduplication: a stream of documents that can be read again, a number for each, and records spilled to disk.

A document's number is its rank by preference (licence, then quality) and then by id, with the documents of an earlier corpus
before all others. So "the smallest number survives" keeps the best copy, of equal ones that with the smallest id, and
documents that were there before, whatever order they come in. Numbers take 4 bytes where ids take 32. Each document costs 16
bytes in the table of ids, and 16 more where the preference differs from the order of the ids.

Records are partitioned by a key, so that a group-by needs the memory of one partition; a sketch finds the keys that repeat.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts

# rows read before the mapped file is released: the system loads 64 kB around each
_ROWS = 1024


class Parts:
    """Records of one numpy dtype in `parts` scratch files; a context manager that removes them at the end.

    Records of a part come back in the order in which they were added.
    """

    def __init__(self, folder: Path, dtype: np.dtype | str, parts: int) -> None:
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self.parts = parts
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._streams: dict[int, BinaryIO] = {}

    def add(self, records: np.ndarray, part: np.ndarray) -> None:
        """Put each record, (N,), into the part, (N,) integers, that is given for it."""
        order = np.argsort(part, kind="stable")
        present, starts = np.unique(part[order], return_index=True)
        for number, rows in zip(present.tolist(), np.split(order, starts)[1:], strict=True):
            self.append(number, records[rows])

    def append(self, part: int, records: np.ndarray) -> None:
        """Put records at the end of one part. Raises OSError when the disk is full."""
        if not len(records):
            # an empty file could not be mapped
            return
        if part not in self._streams:
            self._streams[part] = self.path(part).open("wb")
        self._streams[part].write(np.ascontiguousarray(records, dtype=self.dtype).data.cast("B"))

    def path(self, part: int) -> Path:
        """The file of one part."""
        return self.folder / f"{part:04d}"

    def __getitem__(self, part: int) -> np.ndarray:
        """All records of one part."""
        if part not in self._streams:
            return np.zeros(0, dtype=self.dtype)
        self._streams[part].flush()
        return np.fromfile(self.path(part), dtype=self.dtype)

    def mapped(self, part: int) -> np.ndarray:
        """All records of one part, read only where they are looked at. Release it soon: what was read counts as memory."""
        if part in self._streams:
            self._streams[part].flush()
        # an empty file cannot be mapped
        if part not in self._streams or not self.path(part).stat().st_size:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path(part), dtype=self.dtype, mode="r").view(np.ndarray)

    def take(self, part: int, rows: np.ndarray, width: int) -> np.ndarray:
        """Rows of a part that holds a matrix (·, width), in the given order: (R, width)."""
        chunks = [self.mapped(part).reshape(-1, width)[chunk] for chunk in np.split(rows, range(_ROWS, len(rows), _ROWS))]
        return np.concatenate(chunks)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[part] for part in range(self.parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in self._streams.values():
            stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sketch:
    """Which hashes may have been added twice. It errs on one side only: a hash that was is always found.

    Saves the disk from records that can have no equal. Two bits per cell, at least four cells per hash expected (up to 2^30
    cells, 256 MB). The state after all additions does not depend on their order.
    """

    def __init__(self, expected: int) -> None:
        bits = min(max((4 * expected).bit_length(), _FEWEST_BITS), _MOST_BITS)
        self._shift = np.uint64(64 - bits)
        self._cells = np.zeros(1 << (bits - 2), dtype=np.uint8)

    def add(self, hashes: np.ndarray) -> None:
        """Count hashes, (N,) uint64, each at most up to two."""
        _count(self._cells, self._shift, hashes)

    def repeated(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each hash was added at least twice, or shares a cell with another: (N,) bool."""
        cells = hashes >> self._shift
        return (self._cells[(cells >> np.uint64(2)).astype(np.int64)] >> (cells & np.uint64(3)) * np.uint64(2)) & 2 != 0


_FEWEST_BITS, _MOST_BITS = 16, 30


@compiled
def _count(cells: np.ndarray, shift: np.uint64, hashes: np.ndarray) -> None:
    for value in hashes:
        cell = value >> shift
        place = np.int64(cell >> np.uint64(2))
        within = np.int64(cell & np.uint64(3)) * 2
        seen = np.int64(cells[place]) >> within & 3
        if seen < 2:
            cells[place] += np.uint8(1 << within)


def groups_of_equal(keys: np.ndarray, *order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key occurs more than once: their indices, sorted by key and then by `order`, and a group number for each.

    keys (N,) uint64. Only those rows are sorted by `order`; it is what makes the result independent of how rows came.
    """
    rows = np.argsort(keys)
    equal = keys[rows[1:]] == keys[rows[:-1]]
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[1:] |= equal
    repeated[:-1] |= equal
    rows = rows[repeated]
    rows = rows[np.lexsort((*(column[rows] for column in reversed(order)), keys[rows]))]
    return rows, group_numbers(keys[rows])


def group_numbers(keys: np.ndarray) -> np.ndarray:
    """Group numbers of sorted keys, (N,): 0 for the first and its equals, 1 for the next, and so on."""
    new = np.zeros(len(keys), dtype=np.int64)
    new[1:] = keys[1:] != keys[:-1]
    return np.cumsum(new)


def first_of_groups(groups: np.ndarray) -> np.ndarray:
    """For each row the index of its group's first row, given sorted group numbers, (N,)."""
    starts = np.ones(len(groups), dtype=bool)
    starts[1:] = groups[1:] != groups[:-1]
    return np.flatnonzero(starts)[np.cumsum(starts) - 1] if len(groups) else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Preference:
    """`licenses`: the best first; then come other stated ones, and last of all documents that state none.

    `quality`: score columns by falling priority; the highest is the best, of `-COLUMN` the lowest. A missing score is
    the worst.
    """

    licenses: Sequence[str] = ()
    quality: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """The documents' columns that decide."""
        return ["license", *(name.removeprefix("-") for name in self.quality)]

    def check(self, schema: pa.Schema) -> None:
        """Raises ConfigError for a quality that is no score of the documents."""
        scores = [
            field.name
            for field in schema
            if field.name not in SCHEMA.names and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
        ]
        for name in self.columns[1:]:
            if name not in scores:
                raise ConfigError(f"deduplicate.keep.quality: the documents have no score {name!r}{nearest(name, scores)}")

    def keys(self, batch: pa.RecordBatch) -> np.ndarray:
        """For each document, (N, columns) float64, what it is compared by: smaller is better, column after column."""
        stated = batch.column("license")
        place = pc.fill_null(pc.index_in(stated, pa.array(self.licenses, stated.type)), len(self.licenses))
        unstated = pc.is_null(stated).to_numpy(zero_copy_only=False)
        keys = [place.to_numpy(zero_copy_only=False) + unstated]
        for name in self.quality:
            values = pc.fill_null(pc.cast(batch.column(name.removeprefix("-")), pa.float64()), np.nan)
            scores = values.to_numpy(zero_copy_only=False)
            keys.append(np.where(np.isnan(scores), np.inf, scores if name.startswith("-") else -scores))
        return np.column_stack(keys).astype(np.float64)


#: Streams the given columns, as often as it is called: `partial(iterate_documents, folder)` is one.
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
    rows = np.full(len(wanted), -1, dtype=np.int64)
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
            rows[index] = left
    return rows


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
    """Limits of a batch's chunks: 0, the first row of each further chunk, and the number of rows."""
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
    """The order of documents, (N,) int64 rows of their sorted ids, the best first; of equals, that with the smallest id
    first."""
    keys = np.empty((len(ids), len(preference.columns)))
    for batch in documents(["id", *preference.columns]):
        keys[ranks(ids, parse_ids(batch.column("id")))] = preference.keys(batch)
    return np.lexsort((np.arange(len(ids)), *keys.T[::-1]))
