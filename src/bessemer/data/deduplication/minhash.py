"""MinHash signatures and the keys of their bands (Broder 1997; Indyk and Motwani 1998).

Under a random order of all shingles, two sets have the same smallest one with a probability that is their Jaccard similarity s.
A band holds the minima under `rows` orders; two texts share the key of a band with probability s^rows, and at least one of
`bands` keys with 1 - (1 - s^rows)^bands: 0.92 at s = 0.8 for 14 bands of 8 rows, 0.99 at 0.85, 0.10 at 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.words import hash_words, mixed, run_hash
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts

# shingles whose minima are taken at a time: 8 kB, which stay in the first cache for all orders
_BLOCK = 2048
# the orders are fixed for good
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
    words = np.empty(_BLOCK + ngram - 1, dtype=np.uint64)
    shingles = np.empty(_BLOCK, dtype=np.uint32)
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
