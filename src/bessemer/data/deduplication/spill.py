"""Records on disk, partitioned by a key, so that a group-by needs the memory of one part; and a sketch of repeated hashes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from bessemer.data.text.compiled import compiled

# that are looked at before a mapped file is let go: the system brings 64 kB into memory for each
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
            # a file that is there holds something, and can be mapped
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
        """All records of one part, read only where they are looked at. Let go of it soon: what was read counts as memory."""
        if part in self._streams:
            self._streams[part].flush()
        # nothing cannot be mapped
        if part not in self._streams or not self.path(part).stat().st_size:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path(part), dtype=self.dtype, mode="r").view(np.ndarray)

    def take(self, part: int, rows: np.ndarray, width: int) -> np.ndarray:
        """Rows of a part that holds a matrix (·, width), in the order asked for: (R, width)."""
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
        """Which hashes, (N,) bool, came at least twice, or share a cell with another."""
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
    """Of sorted keys, (N,): 0 for the first and its equals, 1 for the next, and so on."""
    new = np.zeros(len(keys), dtype=np.int64)
    new[1:] = keys[1:] != keys[:-1]
    return np.cumsum(new)


def first_of_groups(groups: np.ndarray) -> np.ndarray:
    """Of sorted group numbers, (N,): for each row the index of its group's first row."""
    starts = np.ones(len(groups), dtype=bool)
    starts[1:] = groups[1:] != groups[:-1]
    return np.flatnonzero(starts)[np.cumsum(starts) - 1] if len(groups) else np.zeros(0, dtype=np.int64)
