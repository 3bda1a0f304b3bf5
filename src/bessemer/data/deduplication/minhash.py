"""Shingles of a text, their Jaccard similarity, and MinHash signatures with band keys (Broder 1997; Indyk and Motwani 1998).

A shingle is a run of n words; a text of fewer words has one shingle of all its words, a text without words none. Under a
random order of all shingles, two sets have the same smallest one with a probability that is their Jaccard similarity s. A band
holds the minima under `rows` orders; two texts share the key of a band with probability s^rows, and at least one of `bands`
keys with 1 - (1 - s^rows)^bands: 0.92 at s = 0.8 for 14 bands of 8 rows, 0.99 at 0.85, 0.10 at 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.data.deduplication.words import fold_table, hash_words, mixed, run_hash, run_hashes
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts

# words of a text whose hashes are in memory at a time
_SHINGLE_BLOCK = 4096


def shingle_sets(texts: Texts, chosen: np.ndarray, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """The shingle sets of some texts: hashes, (S,) uint64, sorted and each once within a text, and offsets, (chosen + 1,).

    chosen (C,) int64: which texts. A text is lower-cased, its numbers become 0, its punctuation and accents go (`similar`).
    """
    sizes = texts.offsets[chosen + 1] - texts.offsets[chosen]
    shingles = np.empty(int((sizes // 2 + 1).sum()), dtype=np.uint64)
    offsets = np.zeros(len(chosen) + 1, dtype=np.int64)
    _sets(texts.data, texts.offsets, chosen, fold_table("similar"), ngram, shingles, offsets)
    return shingles[: offsets[-1]], offsets


@compiled_allocating
def _sets(
    data: np.ndarray,
    offsets: np.ndarray,
    chosen: np.ndarray,
    fold: np.ndarray,
    ngram: int,
    shingles: np.ndarray,
    ends: np.ndarray,
) -> None:
    words = np.empty(_SHINGLE_BLOCK, dtype=np.uint64)
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
                shingles[size] = run_hash(words, 0, count)
                size += 1
            else:
                size += run_hashes(words, count, ngram, shingles[size:])
            carried = min(count, ngram - 1)
            for word in range(carried):
                words[word] = words[count - carried + word]
        size = first + _sorted_once(shingles[first:size])
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
    shingles = np.empty(counts.sum(), dtype=np.uint64)
    size = 0
    for index in range(len(chosen)):
        shingles[size : size + counts[index]] = sets[firsts[index] : firsts[index] + counts[index]]
        size += counts[index]
    return shingles, counts


# shingles whose minima are taken at a time: 8 kB, which stay in the first cache for all orders
_MINHASH_BLOCK = 2048
# never changed, so that signatures stay comparable
_SEED = 0x6265_7373


@dataclass(frozen=True)
class Orders:
    """The random orders of shingles: x -> (x xor mask) * multiplier modulo 2^32, a bijection for odd multipliers.

    masks and multipliers (bands * rows,) uint32.
    """

    bands: int
    rows: int
    masks: np.ndarray
    multipliers: np.ndarray

    @classmethod
    def of(cls, bands: int, rows: int) -> Orders:
        """The same for the same numbers, always."""
        counter = np.arange(1, 2 * bands * rows + 1, dtype=np.uint64) + np.uint64(_SEED << 32)
        random = np.array([_mixed(int(value)) >> 32 for value in counter], dtype=np.uint32)
        return cls(bands, rows, random[0::2].copy(), random[1::2] | np.uint32(1))


def _mixed(value: int) -> int:
    """SplitMix64's generator, in Python's integers."""
    mask = (1 << 64) - 1
    value = value * 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


def band_keys(texts: Texts, orders: Orders, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys, (bands, N) uint64, and which texts have words at all, (N,) bool: the keys of the others mean nothing."""
    keys = np.empty((orders.bands, len(texts)), dtype=np.uint64)
    has_words = np.empty(len(texts), dtype=np.bool_)
    _band_keys(
        texts.data, texts.offsets, fold_table("similar"), ngram, orders.masks, orders.multipliers, orders.rows, keys, has_words
    )
    return keys, has_words


@compiled_allocating
def _band_keys(
    data: np.ndarray,
    offsets: np.ndarray,
    fold: np.ndarray,
    ngram: int,
    masks: np.ndarray,
    multipliers: np.ndarray,
    rows: int,
    keys: np.ndarray,
    has_words: np.ndarray,
) -> None:
    words = np.empty(_MINHASH_BLOCK + ngram - 1, dtype=np.uint64)
    shingles = np.empty(_MINHASH_BLOCK, dtype=np.uint32)
    minima = np.empty(len(masks), dtype=np.uint32)
    nowhere = np.empty((0, 2), dtype=np.int64)
    for text in range(len(offsets) - 1):
        minima[:] = np.uint32(0xFFFFFFFF)
        position, end = offsets[text], offsets[text + 1]
        # words at the end of a block that begin shingles of the next
        carried = 0
        has_words[text] = False
        while position < end:
            count, position = hash_words(data, position, end, fold, words, nowhere, carried)
            total = max(count - ngram + 1, 0)
            for index in range(total):
                shingles[index] = np.uint32(run_hash(words, index, ngram) >> np.uint64(32))
            if total == 0 and not has_words[text] and count > 0 and position == end:
                shingles[0] = np.uint32(run_hash(words, 0, count) >> np.uint64(32))
                total = 1
            if total:
                has_words[text] = True
                _lower(minima, shingles[:total], masks, multipliers)
            carried = min(count, ngram - 1)
            for index in range(carried):
                words[index] = words[count - carried + index]
        for band in range(len(keys)):
            key = np.uint64(band)
            for row in range(band * rows, (band + 1) * rows):
                key = mixed(key ^ np.uint64(minima[row]))
            keys[band, text] = key


@compiled
def _lower(minima: np.ndarray, shingles: np.ndarray, masks: np.ndarray, multipliers: np.ndarray) -> None:
    """The inner loop: everything stays in 32 bits, so that a vector register holds 8 or 16 shingles."""
    for order in range(len(masks)):
        mask, multiplier = masks[order], multipliers[order]
        least = minima[order]
        for index in range(len(shingles)):
            value = np.uint32(np.uint32(shingles[index] ^ mask) * multiplier)
            least = min(least, value)
        minima[order] = least
