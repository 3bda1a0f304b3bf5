"""Shingles: the set of runs of n words of a text, and the similarity of two sets.

A text of fewer than n words has one shingle, of all its words; a text without words has none and is like no other.
"""

from __future__ import annotations

import numpy as np

from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.words import hash_words, run_hash, run_hashes
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts

# words of a text that are held at a time
_BLOCK = 4096


def shingle_sets(texts: Texts, chosen: np.ndarray, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """The shingle sets of some texts: hashes, (S,) uint64, sorted and each once within a text, and offsets, (chosen + 1,).

    chosen (C,) int64: which texts. A text is lower-cased, its numbers become 0, its punctuation and accents go (`similar`).
    """
    sizes = texts.offsets[chosen + 1] - texts.offsets[chosen]
    found = np.empty(int((sizes // 2 + 1).sum()), dtype=np.uint64)
    offsets = np.zeros(len(chosen) + 1, dtype=np.int64)
    _sets(texts.data, texts.offsets, chosen, fold_table("similar"), ngram, found, offsets)
    return found[: offsets[-1]], offsets


@compiled_allocating
def _sets(
    data: np.ndarray, offsets: np.ndarray, chosen: np.ndarray, fold: np.ndarray, ngram: int, found: np.ndarray, ends: np.ndarray
) -> None:
    words = np.empty(_BLOCK, dtype=np.uint64)
    nowhere = np.empty((0, 2), dtype=np.int64)
    size = 0
    for index in range(len(chosen)):
        position, end = offsets[chosen[index]], offsets[chosen[index] + 1]
        first = size
        # words at the end of a block that begin shingles of the next
        carried = 0
        while position < end:
            count, position = hash_words(data, position, end, fold, words, nowhere, carried)
            if position == end and size == first and 0 < count < ngram:
                found[size] = run_hash(words, 0, count)
                size += 1
            else:
                size += run_hashes(words, count, ngram, found[size:])
            carried = min(count, ngram - 1)
            for word in range(carried):
                words[word] = words[count - carried + word]
        size = first + _sorted_once(found[first:size])
        ends[index + 1] = size


@compiled_allocating
def _sorted_once(values: np.ndarray) -> int:
    """Sorts in place, moves each value once to the front, and returns how many there are."""
    values.sort()
    kept = 0
    for index in range(len(values)):
        if index == 0 or values[index] != values[kept - 1]:
            values[kept] = values[index]
            kept += 1
    return kept


@compiled_allocating
def jaccard(sets: np.ndarray, starts: np.ndarray, sizes: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Size of the intersection over size of the union of pairs of sets: (P,) float32.

    sets (S,) uint64, each set sorted; starts and sizes (sets,) int64; left and right (P,) int64. Two empty sets: 0.
    """
    similarities = np.empty(len(left), dtype=np.float32)
    for pair in range(len(left)):
        one, one_end = starts[left[pair]], starts[left[pair]] + sizes[left[pair]]
        other, other_end = starts[right[pair]], starts[right[pair]] + sizes[right[pair]]
        union = sizes[left[pair]] + sizes[right[pair]]
        common = 0
        while one < one_end and other < other_end:
            here, there = sets[one], sets[other]
            common += here == there
            # no branch to mispredict
            one += here <= there
            other += there <= here
        similarities[pair] = common / (union - common) if union else 0.0
    return similarities


@compiled_allocating
def sets_between(
    sets: np.ndarray, starts: np.ndarray, sizes: np.ndarray, chosen: np.ndarray, low: np.uint64, high: np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Of chosen sets, (C,) int64, the shingles from `low` to `high`, set after set, and how many of each, (C,) int64."""
    counts = np.empty(len(chosen), dtype=np.int64)
    firsts = np.empty(len(chosen), dtype=np.int64)
    for index in range(len(chosen)):
        values = sets[starts[chosen[index]] : starts[chosen[index]] + sizes[chosen[index]]]
        first = np.searchsorted(values, low)
        firsts[index] = starts[chosen[index]] + first
        counts[index] = np.searchsorted(values, high, side="right") - first
    found = np.empty(counts.sum(), dtype=np.uint64)
    size = 0
    for index in range(len(chosen)):
        found[size : size + counts[index]] = sets[firsts[index] : firsts[index] + counts[index]]
        size += counts[index]
    return found, counts
