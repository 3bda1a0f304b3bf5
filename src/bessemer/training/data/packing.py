"""Documents into rows of fixed length, none of which sees another, with next to nothing left empty.

Best-fit decreasing puts the longest document first, each into the fullest row that still holds it (Johnson 1973; for
language models Ding et al. 2024, "Fewer truncations improve language modeling"). Natural lengths leave far below 1 % of
the rows empty; where they do not (every document a little over half a row), the emptiest rows' documents are cut to fill
the others.

Shapes: N documents or pieces, R rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import IGNORED, Batch
from bessemer.training.data.memmap import stored_arrays

#: Raised when the same documents come into other rows than before.
_PLAN_VERSION = 1
#: Rows are packed from this many in turn at least: fewer leave the last one's room a noticeable share.
_LEAST_ROWS = 512
#: Share of the rows' tokens that may stay empty before documents are cut to fill them.
_TOLERATED_WASTE = 0.005

_DTYPES = {"starts": np.int64, "lengths": np.int64, "sources": np.int16, "ends": np.int64}


def best_fit(lengths: ArrayLike, capacity: int) -> np.ndarray:
    """Which row each item goes into, (N,) int64: the longest first, each into the fullest row that still holds it.

    Every length must be between 1 and `capacity`. Items of one length are placed together, so that the time grows with
    the number of different lengths; rows that are equally full are taken in the order in which they were opened.
    """
    lengths = np.asarray(lengths, np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    open_rows: dict[int, np.ndarray] = {}  # by the tokens that they have left
    rooms = 0  # bit r is set where some row has r tokens left
    opened = 0
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    for items in np.split(order, edges) if len(order) else []:
        length = int(lengths[items[0]])
        while len(items):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = open_rows.pop(room)
                rooms ^= 1 << room
            each = (room if fitting else capacity) // length  # a row that took one and has room is the fullest again
            needed = -(-len(items) // each)
            if fitting:
                taken, left = candidates[:needed], candidates[needed:]
            else:
                room, taken, left = capacity, np.arange(opened, opened + needed), np.empty(0, np.int64)
                opened += needed
            placed = min(len(items), each * len(taken))
            rows[items[:placed]] = np.repeat(taken, each)[:placed]
            items = items[placed:]
            full, remainder = divmod(placed, each)
            for room_left, moved in (
                (room, left),
                (room - each * length, taken[:full]),
                (room - remainder * length, taken[full:]),
            ):
                if room_left and len(moved):
                    before = open_rows.get(room_left)
                    open_rows[room_left] = moved if before is None else np.sort(np.concatenate([before, moved]))
                    rooms |= 1 << room_left
    return rows


def pack_rows(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], context_length: int, padding_id: int) -> Batch:
    """Rows of pieces, each (tokens, targets) of equal length, as a batch in which no piece sees another.

    Positions restart with every piece; pieces are numbered from 1 in each row, and 0 is the padding, which has no targets.
    """
    shape = (len(rows), context_length)
    tokens_BT, targets_BT = np.full(shape, padding_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions_BT, documents_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, pieces in enumerate(rows):
        start = 0
        for number, (tokens, targets) in enumerate(pieces, start=1):
            place = (row, slice(start, start + len(tokens)))
            tokens_BT[place], targets_BT[place] = tokens, targets
            positions_BT[place], documents_BT[place] = np.arange(len(tokens)), number
            start += len(tokens)
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(targets_BT),
        torch.from_numpy(positions_BT),
        torch.from_numpy(documents_BT),
    )


@dataclass(frozen=True)
class Pieces:
    """Documents, or parts of them, in rows: (N,) where each starts in the stream, its tokens, its source, its row."""

    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    rows: np.ndarray


class RowPlan:
    """Which pieces of a stream make each row. A pure function of the stream, the row's length and the room reserved."""

    def __init__(
        self,
        shards: TokenShards,
        context_length: int,
        *,
        reserved: int = 0,
        reserved_sources: Collection[int] | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Plan the rows, or find the plan in the folder `scratch`, where it is kept and mapped; None: it is in memory.

        reserved: tokens left free behind each piece of the sources with numbers `reserved_sources` (all when None), for
        tokens that are added later. Raises ArtefactError when there are no documents.
        """
        if not shards.document_count:
            raise ArtefactError(f"{shards.folder}: holds no documents to pack into rows; add documents")
        assert context_length > reserved
        only = None if reserved_sources is None else sorted(reserved_sources)
        settings = [_PLAN_VERSION, shards.fingerprint, context_length, reserved, only]
        self.fingerprint = hash_value(settings)
        chunks = _chunks(shards, context_length, reserved, only)
        arrays = stored_arrays(scratch, f"rows-{self.fingerprint}", _DTYPES, chunks)
        self._starts, self._lengths, self._sources = arrays["starts"], arrays["lengths"], arrays["sources"]
        self._ends = arrays["ends"]
        self.rows = len(self._ends)
        #: Share of the rows' tokens that documents fill.
        self.filled = (shards.tokens - 1) / (self.rows * context_length)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start in the stream, length and source of every piece of a row."""
        place = slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        return self._starts[place], self._lengths[place], self._sources[place]


def _chunks(
    shards: TokenShards, context_length: int, reserved: int, reserved_sources: Collection[int] | None
) -> Iterator[dict[str, np.ndarray]]:
    """The plan part by part: so many documents in turn that few tokens are lost, and memory stays bounded."""
    start = pieces_before = tokens = 0
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for lengths, sources in shards.lengths_and_sources():
        waiting.append((lengths, sources))
        tokens += int(lengths.sum())
        if tokens < _LEAST_ROWS * context_length and start + tokens < shards.tokens - 1:  # and documents follow
            continue
        lengths, sources = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
        starts = start + np.cumsum(lengths) - lengths
        packed = pack(starts, lengths, sources, context_length, _added(sources, reserved, reserved_sources))
        order = np.argsort(packed.rows, kind="stable")
        ends = pieces_before + np.cumsum(np.bincount(packed.rows))
        yield {
            "starts": packed.starts[order],
            "lengths": packed.lengths[order],
            "sources": packed.sources[order],
            "ends": ends,
        }
        start, pieces_before, waiting, tokens = start + tokens, int(ends[-1]), [], 0


def _added(sources: np.ndarray, reserved: int, reserved_sources: Collection[int] | None) -> np.ndarray:
    if reserved_sources is None:
        return np.full(len(sources), reserved, np.int64)
    return np.where(np.isin(sources, list(reserved_sources)), reserved, 0)


def pack(starts: np.ndarray, lengths: np.ndarray, sources: np.ndarray, capacity: int, added: np.ndarray) -> Pieces:
    """Documents in rows of `capacity` tokens, each taking its length and `added`, (N,), more; the long ones are cut.

    Returns pieces in the order in which they stand in their rows. Less than 0.5 % of the rows and one row more stay empty.
    """
    room = capacity - added
    counts = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * room[document]
    pieces = Pieces(
        starts[document] + offsets,
        np.minimum(lengths[document] - offsets, room[document]),
        sources[document],
        np.empty(0, np.int64),
    )
    sizes = pieces.lengths + added[document]
    rows = best_fit(sizes, capacity)
    used = np.bincount(rows, weights=sizes).astype(np.int64)
    free = int(len(used) * capacity - used.sum())
    tolerated = _TOLERATED_WASTE * len(used) * capacity
    given_up = min(math.ceil((free - tolerated) / (capacity * (1 - _TOLERATED_WASTE))), free // capacity)
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    pieces = Pieces(pieces.starts[order], pieces.lengths[order], pieces.sources[order], rows[order])
    if given_up <= 0:
        return pieces
    return _cut_to_fill(pieces, added[document][order], used, capacity, given_up)


def _cut_to_fill(pieces: Pieces, added: np.ndarray, used: np.ndarray, capacity: int, given_up: int) -> Pieces:
    """Cut what the `given_up` emptiest rows hold into pieces that fill the emptiest of the others."""
    by_use = np.argsort(used, kind="stable")
    dissolved = np.isin(pieces.rows, by_use[:given_up])
    kept = np.sort(by_use[given_up:])
    renumbered = np.searchsorted(kept, pieces.rows[~dissolved])
    targets = iter(np.searchsorted(kept, by_use[given_up:]).tolist())
    rooms = iter((capacity - used[by_use[given_up:]]).tolist())
    rows, new = len(kept), []
    row, room = next(targets), next(rooms)
    for start, length, source, extra in zip(
        *(values[dissolved].tolist() for values in (pieces.starts, pieces.lengths, pieces.sources, added)), strict=True
    ):
        while length:
            if room <= extra:
                row, room = next(targets, rows), next(rooms, capacity)
                rows = max(rows, row + 1)
                continue
            taken = min(length, room - extra)
            new.append((start, taken, source, row))
            start, length, room = start + taken, length - taken, room - taken - extra
    columns = np.array(new, np.int64).T
    return Pieces(
        *(
            np.concatenate([old, column.astype(old.dtype)])
            for old, column in zip(
                (pieces.starts[~dissolved], pieces.lengths[~dissolved], pieces.sources[~dissolved], renumbered),
                columns,
                strict=True,
            )
        )
    )
