"""Runs of as many words as an n-gram has, as 64-bit hashes, and a table to look them up in.

In scripts without spaces between words each character is compared, and takes as much of a run as it has of a word: an ideograph
a half, a letter of Thai, Lao, Khmer or Burmese and a kana a quarter. So a run of 13 words is 26 Chinese characters, 52 Thai
letters, or some 40 characters of Japanese; thirteen of them would be three words, which stand on any page.
"""

from __future__ import annotations

import numpy as np

from bessemer.data.deduplication.folding import ALONE, LIMIT
from bessemer.data.deduplication.words import BASE, hash_words, mixed, most_words, run_hash
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.utf8 import code_point

#: What a word takes of a run, and what a character of a script without spaces does.
_WORD, _IDEOGRAPH, _LETTER = 4, 2, 1
_FIRST_IDEOGRAPH, _FIRST_HALF_WIDTH = 0x3400, 0xFF66
#: The first byte of a character beyond U+07FF.
_THREE_BYTES = 0xE0


@compiled
def run_sizes(data: np.ndarray, fold: np.ndarray, places: np.ndarray, count: int, sizes: np.ndarray) -> int:
    """What each of `count` words takes of a run, to `sizes`; returns their sum."""
    total = 0
    for word in range(count):
        size, first = _WORD, places[word, 0]
        if data[first] >= _THREE_BYTES:
            code, _ = code_point(data, first)
            if code >= LIMIT or fold[code] & ALONE:
                size = _IDEOGRAPH if code >= _FIRST_IDEOGRAPH and not _FIRST_HALF_WIDTH <= code < LIMIT else _LETTER
        sizes[word] = size
        total += size
    return total


@compiled
def sized_runs(
    hashes: np.ndarray, sizes: np.ndarray, count: int, ngram: int, powers: np.ndarray, ends: np.ndarray, runs: np.ndarray
) -> int:
    """Of the run that begins with each word the word behind its last, to `ends`, and its hash, that of `run_hash`, to `runs`.

    A run is the fewest words that are as large as `ngram` words. Returns how many runs there are. powers: of `BASE`.
    """
    value, size, end = np.uint64(0), 0, 0
    for first in range(count):
        while size < ngram * _WORD and end < count:
            value = value * BASE + hashes[end]
            size += sizes[end]
            end += 1
        if size < ngram * _WORD:
            return first
        length = end - first
        runs[first] = mixed(np.uint64(length) * powers[length] + value)
        ends[first] = end
        value -= hashes[first] * powers[length - 1]
        size -= sizes[first]
    return count


@compiled_allocating
def powers_of_base(ngram: int) -> np.ndarray:
    """Powers of `BASE`, uint64, up to the most words that a run can have."""
    powers = np.ones(ngram * _WORD + 1, dtype=np.uint64)
    for exponent in range(1, len(powers)):
        powers[exponent] = powers[exponent - 1] * BASE
    return powers


@compiled_allocating
def index_runs(
    data: np.ndarray, offsets: np.ndarray, fold: np.ndarray, ngram: int, least_words: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, items and lengths, (R,) each, of all runs, whose length is given as 0, and of whole items that are shorter."""
    size = 0
    for text in range(len(offsets) - 1):
        size += most_words(offsets[text + 1] - offsets[text])
    hashes = np.empty(size, dtype=np.uint64)
    owners = np.empty(size, dtype=np.int64)
    lengths = np.empty(size, dtype=np.int64)
    words = np.empty(size, dtype=np.uint64)
    places = np.empty((size, 2), dtype=np.int64)
    sizes = np.empty(size, dtype=np.int64)
    ends = np.empty(size, dtype=np.int64)
    powers = powers_of_base(ngram)
    found = 0
    for text in range(len(offsets) - 1):
        count, _ = hash_words(data, offsets[text], offsets[text + 1], fold, words, places, 0)
        whole = run_sizes(data, fold, places, count, sizes)
        total = sized_runs(words, sizes, count, ngram, powers, ends, hashes[found:])
        lengths[found : found + total] = 0
        if total == 0 and whole >= least_words * _WORD:
            hashes[found], lengths[found], total = run_hash(words, 0, count), count, 1
        owners[found : found + total] = text
        found += total
    return hashes[:found], owners[:found], lengths[:found]


@compiled_allocating
def hash_table(runs: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Open addressing at a load of at most a half: hashes (T,) uint64 and owners (T,) int64. Of equal runs the first counts."""
    bits = 4
    while (1 << bits) < 2 * len(runs):
        bits += 1
    table = np.zeros(1 << bits, dtype=np.uint64)
    owners = np.full(1 << bits, -1, dtype=np.int64)
    for index in range(len(runs)):
        place = place_of_run(table, owners, runs[index])
        if owners[place] < 0:
            table[place], owners[place] = runs[index], items[index]
    return table, owners


@compiled
def place_of_run(table: np.ndarray, owners: np.ndarray, run: np.uint64) -> np.int64:
    """Where a run's hash lies in the table, or the empty place where it would."""
    place = np.int64(run & np.uint64(len(table) - 1))
    while owners[place] >= 0 and table[place] != run:
        place = (place + 1) & (len(table) - 1)
    return place
