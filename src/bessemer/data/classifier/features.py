"""Features of the classifier: words, pairs of neighbouring words and, where asked for, subwords.

Each is hashed to a bucket (Weinberger et al. 2009), so no vocabulary is kept and any text has features. Words are runs of
ASCII letters and digits and of bytes beyond ASCII, without ASCII's case; each other sign that is no white space is a word of
its own. Pieces are runs of bytes inside a word, its ends marked, as in fastText (Bojanowski et al. 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.tables import longest_text
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.ascii import in_word, small


class Features(NamedTuple):
    """Sequences of up to `word_order` words, subwords of `shortest` to `longest` bytes (0: none), in 2^bits buckets."""

    word_order: int
    shortest: int
    longest: int
    bits: int


def features_of(texts: Texts, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of every feature of every text, int32, text after text, and where each text's begin, (N + 1,) int64."""
    _, sizes = summed(texts, features, np.zeros(1 << features.bits, np.float32))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return _fill(texts.data, texts.offsets, features, starts), starts


def summed(texts: Texts, features: Features, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the sum of its features' weights, float64, and how many features it has."""
    return _summed(texts.data, texts.offsets, features, weights)


_SPACE = ord(" ")
_BEGIN = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_PIECES = np.uint64(0xD6E8FEB86659FD93)


@compiled_allocating
def _fill(data: np.ndarray, offsets: np.ndarray, features: Features, starts: np.ndarray) -> np.ndarray:
    found = np.empty(starts[-1], np.int32)
    buckets = np.empty(longest_text(offsets) * (features.word_order + _subwords_per_byte(features)), np.int32)
    words = np.empty(longest_text(offsets), np.uint64)
    for text in range(len(offsets) - 1):
        count = _of_text(data, offsets[text], offsets[text + 1], features, words, buckets)
        found[starts[text] : starts[text + 1]] = buckets[:count]
    return found


@compiled_allocating
def _summed(data: np.ndarray, offsets: np.ndarray, features: Features, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums, sizes = np.zeros(len(offsets) - 1), np.zeros(len(offsets) - 1, np.int64)
    buckets = np.empty(longest_text(offsets) * (features.word_order + _subwords_per_byte(features)), np.int32)
    words = np.empty(longest_text(offsets), np.uint64)
    for text in range(len(sums)):
        sizes[text] = _of_text(data, offsets[text], offsets[text + 1], features, words, buckets)
        total = 0.0
        for place in range(sizes[text]):
            total += weights[buckets[place]]
        sums[text] = total
    return sums, sizes


@compiled
def _subwords_per_byte(features: Features) -> int:
    """More subwords do not begin at a byte, the two marks of a word's ends counted to its bytes."""
    return 3 * (features.longest - features.shortest + 1) if features.longest else 0


@compiled
def _of_text(data: np.ndarray, first: int, last: int, features: Features, words: np.ndarray, buckets: np.ndarray) -> int:
    """Write the buckets of one text's features; return how many."""
    shift = np.uint64(64 - features.bits)
    count, filled = 0, 0
    at = first
    while at < last:
        if data[at] <= _SPACE:
            at += 1
            continue
        begin = at
        value = _BEGIN
        if in_word(data[at]):
            while at < last and in_word(data[at]):
                value = (value ^ np.uint64(small(data[at]))) * _PRIME
                at += 1
        else:
            value = (value ^ np.uint64(data[at])) * _PRIME
            at += 1
        value ^= value >> np.uint64(32)
        words[count] = value
        sequence = value
        for order in range(features.word_order):
            if order > count:
                break
            if order:
                sequence = (sequence ^ (words[count - order] * _PIECES)) * _SPREAD
                sequence ^= sequence >> np.uint64(31)
            buckets[filled] = np.int32((sequence * _SPREAD) >> shift)
            filled += 1
        count += 1
        if features.longest:
            filled = _subwords(data, begin, at, features, shift, buckets, filled)
    return filled


@compiled
def _subwords(
    data: np.ndarray, begin: int, end: int, features: Features, shift: np.uint64, buckets: np.ndarray, filled: int
) -> int:
    """Append the subwords of one word, marked at both ends by a byte that text does not have."""
    length = end - begin + 2
    for start in range(length - features.shortest + 1):
        value = _PIECES
        for offset in range(min(features.longest, length - start)):
            place = start + offset
            byte = np.uint8(1) if place == 0 or place == length - 1 else small(data[begin + place - 1])
            value = (value ^ np.uint64(byte)) * _PRIME
            if offset + 1 >= features.shortest:
                buckets[filled] = np.int32(((value ^ (value >> np.uint64(32))) * _SPREAD) >> shift)
                filled += 1
    return filled
