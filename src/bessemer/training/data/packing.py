"""Packing of documents into rows of fixed length, in which they do not attend to each other.

Best-fit decreasing places the longest document first, each into the fullest row that still has space (Johnson 1973; for
language models Ding et al. 2024, "Fewer truncations improve language modeling"). Natural lengths leave far below 1 % of the
rows empty; where they do not (every document a little over half a row), the documents of the emptiest rows are split to fill
the others.

A segment is a document or a part of a split one. Shapes: N segments, R rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.batches import StatelessBatches, epochs_of_step, rows_of_step
from bessemer.training.data.token_stream import ADDED_TOKENS, FillInTheMiddle, memmapped_arrays

#: Version of the row plan; raised when the same documents are packed into different rows.
_PLAN_VERSION = 1
#: Fewest rows that are packed at once: with fewer, the free tokens of the last row are a noticeable fraction.
_LEAST_ROWS = 512
#: Fraction of the rows' tokens that may stay empty before documents are split to fill them.
_TOLERATED_WASTE = 0.005

_DTYPES = {"starts": np.int64, "lengths": np.int64, "sources": np.int16, "ends": np.int64}


def best_fit(lengths: ArrayLike, capacity: int) -> np.ndarray:
    """The row of each item, (N,) int64: the longest first, each into the fullest row that still has space.

    Every length must be between 1 and `capacity`. Items of one length are placed together, so that the time grows with
    the number of different lengths; rows that are equally full are filled in the order in which they were opened.
    """
    lengths = np.asarray(lengths, np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    #: Rows by their number of free tokens.
    open_rows: dict[int, np.ndarray] = {}
    #: Bit r is set where some row has r free tokens.
    free_sizes = 0
    opened = 0
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    for items in np.split(order, edges) if len(order) else []:
        length = int(lengths[items[0]])
        while len(items):
            fitting = free_sizes >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                candidates = open_rows.pop(free)
                free_sizes ^= 1 << free
            # a row takes as many of these items as fit: after each it is still the fullest that has room
            each = (free if fitting else capacity) // length
            needed = -(-len(items) // each)
            if fitting:
                taken, left = candidates[:needed], candidates[needed:]
            else:
                free, taken, left = capacity, np.arange(opened, opened + needed), np.empty(0, np.int64)
                opened += needed
            placed = min(len(items), each * len(taken))
            rows[items[:placed]] = np.repeat(taken, each)[:placed]
            items = items[placed:]
            full, remainder = divmod(placed, each)
            for free_left, moved in (
                (free, left),
                (free - each * length, taken[:full]),
                (free - remainder * length, taken[full:]),
            ):
                if free_left and len(moved):
                    before = open_rows.get(free_left)
                    open_rows[free_left] = moved if before is None else np.sort(np.concatenate([before, moved]))
                    free_sizes |= 1 << free_left
    return rows


def pack_rows(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    context_length: int,
    padding_id: int,
    shared: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Rows of segments, each (tokens, targets) of equal length, as a batch in which segments do not attend to each other.

    Positions restart with every segment; segments are numbered from 1 in each row, and 0 is padding, which has no targets.
    shared: of each segment, how many tokens stand before its own: the first ones of the last segment in the row that has none
    before it, and as many for each that shares with that one. They are in the row once, seen by all of them.
    """
    shape = (len(rows), context_length)
    tokens_BT, targets_BT = np.full(shape, padding_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions_BT, documents_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    last_BT = np.zeros(shape, np.int64)
    for row, segments in enumerate(rows):
        start = whole = 0
        for number, (tokens, targets) in enumerate(segments, start=1):
            before = shared[row][number - 1] if shared else 0
            place = (row, slice(start, start + len(tokens)))
            tokens_BT[place], targets_BT[place] = tokens, targets
            positions_BT[place], documents_BT[place] = np.arange(before, before + len(tokens)), number
            last_BT[place] = number
            if before:
                last_BT[row, whole : whole + before] = number
            else:
                whole = start
            start += len(tokens)
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(targets_BT),
        torch.from_numpy(positions_BT),
        torch.from_numpy(documents_BT),
        visible_to_BT=torch.from_numpy(last_BT) if shared and any(map(any, shared)) else None,
    )


@dataclass(frozen=True)
class Segments:
    """Segments in rows: (N,) start of each in the stream, its number of tokens, its source, its row."""

    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    rows: np.ndarray


class RowPlan:
    """The segments of each row. A pure function of the stream, the row's length and the reserved tokens."""

    def __init__(
        self,
        shards: TokenShards,
        context_length: int,
        *,
        reserved: int = 0,
        reserved_sources: Collection[int] | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Plan the rows, or memory-map the plan in the folder `scratch`; None: the plan is in memory.

        reserved: tokens left free after each segment of the sources with numbers `reserved_sources` (all when None), for
        tokens that are added later. Raises ArtefactError when there are no documents.
        """
        if not shards.document_count:
            raise ArtefactError(f"{shards.folder}: holds no documents to pack into rows; add documents")
        assert context_length > reserved
        only = None if reserved_sources is None else sorted(reserved_sources)
        settings = [_PLAN_VERSION, shards.fingerprint, context_length, reserved, only]
        self.fingerprint = hash_value(settings)
        chunks = _chunks(shards, context_length, reserved, only)
        arrays = memmapped_arrays(scratch, f"rows-{self.fingerprint}", _DTYPES, chunks)
        self._starts = arrays["starts"]
        self._lengths = arrays["lengths"]
        self._sources = arrays["sources"]
        self._ends = arrays["ends"]
        self.rows = len(self._ends)
        #: Fraction of the rows' tokens that documents fill.
        self.filled = (shards.tokens - 1) / (self.rows * context_length)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start in the stream, length and source of every segment of a row."""
        place = slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        return self._starts[place], self._lengths[place], self._sources[place]


def _chunks(
    shards: TokenShards, context_length: int, reserved: int, reserved_sources: Collection[int] | None
) -> Iterator[dict[str, np.ndarray]]:
    """The plan in chunks of documents, large enough to waste few tokens and small enough to bound memory."""
    start = segments_before = tokens = 0
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for lengths, sources in shards.lengths_and_sources():
        pending.append((lengths, sources))
        tokens += int(lengths.sum())
        is_last = start + tokens >= shards.tokens - 1
        if tokens < _LEAST_ROWS * context_length and not is_last:
            continue
        lengths, sources = (np.concatenate(parts) for parts in zip(*pending, strict=True))
        starts = start + np.cumsum(lengths) - lengths
        packed = pack(starts, lengths, sources, context_length, _added(sources, reserved, reserved_sources))
        order = np.argsort(packed.rows, kind="stable")
        ends = segments_before + np.cumsum(np.bincount(packed.rows))
        yield {
            "starts": packed.starts[order],
            "lengths": packed.lengths[order],
            "sources": packed.sources[order],
            "ends": ends,
        }
        start, segments_before, pending, tokens = start + tokens, int(ends[-1]), [], 0


def _added(sources: np.ndarray, reserved: int, reserved_sources: Collection[int] | None) -> np.ndarray:
    if reserved_sources is None:
        return np.full(len(sources), reserved, np.int64)
    return np.where(np.isin(sources, list(reserved_sources)), reserved, 0)


def pack(starts: np.ndarray, lengths: np.ndarray, sources: np.ndarray, capacity: int, added: np.ndarray) -> Segments:
    """Documents in rows of `capacity` tokens, each taking its length and `added`, (N,), more; longer ones are split.

    Returns the segments in their order in the rows. At most 0.5 % of the rows and one row more stay empty.
    """
    longest = capacity - added
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * longest[document]
    segments = Segments(
        starts[document] + offsets,
        np.minimum(lengths[document] - offsets, longest[document]),
        sources[document],
        np.empty(0, np.int64),
    )
    sizes = segments.lengths + added[document]
    rows = best_fit(sizes, capacity)
    used = np.bincount(rows, weights=sizes).astype(np.int64)
    free = int(len(used) * capacity - used.sum())
    tolerated = _TOLERATED_WASTE * len(used) * capacity
    given_up = min(math.ceil((free - tolerated) / (capacity * (1 - _TOLERATED_WASTE))), free // capacity)
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    segments = Segments(segments.starts[order], segments.lengths[order], segments.sources[order], rows[order])
    if given_up <= 0:
        return segments
    return _split_to_fill(segments, added[document][order], used, capacity, given_up)


def _split_to_fill(segments: Segments, added: np.ndarray, used: np.ndarray, capacity: int, given_up: int) -> Segments:
    """Split the segments of the `given_up` emptiest rows to fill the emptiest of the others."""
    by_use = np.argsort(used, kind="stable")
    dissolved = np.isin(segments.rows, by_use[:given_up])
    kept = np.sort(by_use[given_up:])
    renumbered = np.searchsorted(kept, segments.rows[~dissolved])
    targets = iter(np.searchsorted(kept, by_use[given_up:]).tolist())
    free_sizes = iter((capacity - used[by_use[given_up:]]).tolist())
    rows, new = len(kept), []
    row, free = next(targets), next(free_sizes)
    for start, length, source, extra in zip(
        *(values[dissolved].tolist() for values in (segments.starts, segments.lengths, segments.sources, added)), strict=True
    ):
        while length:
            if free <= extra:
                row, free = next(targets, rows), next(free_sizes, capacity)
                rows = max(rows, row + 1)
                continue
            taken = min(length, free - extra)
            new.append((start, taken, source, row))
            start, length, free = start + taken, length - taken, free - taken - extra
    columns = np.array(new, np.int64).T
    return Segments(
        *(
            np.concatenate([old, column.astype(old.dtype)])
            for old, column in zip(
                (segments.starts[~dissolved], segments.lengths[~dissolved], segments.sources[~dissolved], renumbered),
                columns,
                strict=True,
            )
        )
    )


class DocumentBatches(StatelessBatches):
    """Batches of packed documents, each with its begin token first and its end token as the last target.

    Every epoch reads the same rows in another order. A document that is split into segments has the begin token in the first
    alone, and the last target of a segment is the first token of the next.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        scratch: Path | None = None,
        fill_in_the_middle: FillInTheMiddle | None = None,
    ) -> None:
        """scratch: folder of the memory-mapped row plan; None: in memory. Raises ArtefactError without documents."""
        self.batch_size = batch_size
        self._shards = shards
        self._context_length = context_length
        self._seed = seed
        self._fill_in_the_middle = fill_in_the_middle
        self._plan = RowPlan(
            shards,
            context_length,
            reserved=ADDED_TOKENS if fill_in_the_middle else 0,
            reserved_sources=fill_in_the_middle.sources if fill_in_the_middle else None,
            scratch=scratch,
        )
        self.rows = self._plan.rows
        self.filled = self._plan.filled
        self._begin_id = int(shards.read(0, 1)[0])
        changes = [fill_in_the_middle.fingerprint] if fill_in_the_middle else []
        self.fingerprint = hash_value([self._plan.fingerprint, batch_size, seed, *changes])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        epochs = epochs_of_step(step, self.batch_size, self.rows)[rows]
        packed: list[list[tuple[np.ndarray, np.ndarray]]] = []
        sources_BT = np.zeros((len(chosen), self._context_length), np.int16)
        for row, (number, epoch) in enumerate(zip(chosen.tolist(), epochs.tolist(), strict=True)):
            starts, lengths, sources = self._plan.row(number)
            places = zip(starts.tolist(), lengths.tolist(), sources.tolist(), strict=True)
            segments = [self._segment(*place, epoch) for place in places]
            packed.append([(segment[:-1], segment[1:]) for segment in segments])
            token_sources = np.repeat(sources, [len(segment) - 1 for segment in segments])
            sources_BT[row, : len(token_sources)] = token_sources
        batch = pack_rows(packed, self._context_length, self._begin_id)
        return replace(batch, sources_BT=torch.from_numpy(sources_BT), source_names=self._shards.sources)

    def _segment(self, start: int, length: int, source: int, epoch: int) -> np.ndarray:
        """A segment's tokens and the token after it."""
        tokens = self._shards.read(start, length + 1)
        if self._fill_in_the_middle is None:
            return tokens
        return self._fill_in_the_middle.document(tokens, start, epoch, source)
