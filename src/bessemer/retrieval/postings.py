"""Loops over the postings of a word index, compiled by Numba.

Postings are the pairs of a term's rows and scores, in the order of rows. Shapes: V terms, P postings, N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bessemer.data.text.compiled import compiled, compiled_allocating


@compiled_allocating
def best_rows(
    terms: NDArray[np.int64],
    starts: NDArray[np.int64],
    rows: NDArray[np.int32],
    scores: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    size: int,
    count: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` rows with the greatest sums of the scores of terms, or fewer; the best first, of equal ones the first row.

    terms: places in `starts`; one that occurs twice counts twice. starts: (V + 1,), of each term's postings. rows, scores:
    (P,), all scores above 0. allowed: (N,), or (0,): all rows. size: N.
    """
    most = 0
    for term in terms:
        most += starts[term + 1] - starts[term]
    sums = np.zeros(size, np.float32)
    touched = np.empty(min(most, size) + 1, np.uint32)
    found = np.uint64(0)
    for term in terms:
        for place in range(np.uint64(starts[term]), np.uint64(starts[term + 1])):
            # unsigned: of a signed place Numba looks whether it is below 0
            row = np.uint32(rows[place])
            before = sums[row]
            touched[found] = row
            found += np.uint64(before == 0)
            sums[row] = before + scores[place]
    # the bits of floats above 0 are ordered as they are; behind them, of equal ones the first row is the greatest
    bits = sums.view(np.uint32)
    heap = np.empty(min(np.uint64(count), found), np.uint64)
    held = np.uint64(0)
    for place in range(found):
        row = touched[place]
        if len(allowed) > 0 and not allowed[row]:
            continue
        key = (np.uint64(bits[row]) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - row)
        if held < len(heap):
            heap[held] = key
            held += np.uint64(1)
            if held == len(heap):
                # the least of an ascending array is where that of a heap is
                heap.sort()
        elif key > heap[0]:
            _replace_least(heap, key)
    keys = np.sort(heap[:held])[::-1]
    best_rows = np.empty(len(keys), np.int32)
    best_sums = np.empty(len(keys), np.float32)
    for place in range(len(keys)):
        best_rows[place] = np.uint32(0xFFFFFFFF) - np.uint32(keys[place] & np.uint64(0xFFFFFFFF))
        best_sums[place] = sums[best_rows[place]]
    return best_rows, best_sums


@compiled
def _replace_least(heap: NDArray[np.uint64], key: np.uint64) -> None:
    """Put a key in the place of the least one of a heap, whose least is at its root."""
    end = np.uint64(len(heap))
    place = np.uint64(0)
    while True:
        child = np.uint64(2) * place + np.uint64(1)
        if child >= end:
            break
        other = child + np.uint64(1)
        if other < end and heap[other] < heap[child]:
            child = other
        if heap[child] >= key:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = key


@compiled
def fill_postings(
    terms: NDArray[np.int32],
    entries: NDArray[np.int32],
    frequencies: NDArray[np.int32],
    weights: NDArray[np.float64],
    penalties: NDArray[np.float64],
    gain: float,
    first: int,
    last: int,
    cursors: NDArray[np.int64],
    rows: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> None:
    """Write the postings of the terms from `first` up to `last` that are among some entries.

    terms, entries, frequencies: each entry's term, row, and how often the row has the term; ordered by rows. weights: (V,),
    idf. penalties: (N,), what is added to the frequency in BM25's denominator. gain: k₁ + 1. cursors: (V,), places in `rows`
    and `scores` where each term's next posting comes, moved on.
    """
    for place in range(len(terms)):
        term = terms[place]
        if first <= term < last:
            row = entries[place]
            cursor = cursors[term]
            frequency = float(frequencies[place])
            rows[cursor] = row
            scores[cursor] = weights[term] * frequency * gain / (frequency + penalties[row])
            cursors[term] = cursor + 1
