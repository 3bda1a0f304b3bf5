"""Measures of texts: counts for the rules of Gopher, C4 and FineWeb (`rules.py`), rounding, repeated lines.

Quality (Rae et al. 2021, section A.1.1): words, lines and marks are counted as datatrove counts them, whose verdicts the
limits are known by. Punctuation marks are words; words of symbols alone count for shares but not for `words`; blank lines
count. In scripts without spaces, the share of words with a letter goes by the number of words that the letters come to.

Repetition (section A.1.1 and table A1): lines, paragraphs and n-grams that occurred before. An n-gram can only occur twice
where its first n - 1 words do, so each n looks only at the places that n - 1 found repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.filters.rules import STOP_WORDS
from bessemer.data.text.characters import FIRST_IDEOGRAPH, IDEOGRAPHS_PER_WORD, LETTERS_PER_WORD, code_point, is_without_spaces
from bessemer.data.text.compiled import compiled, fnv_hash
from bessemer.data.text.lines import BEGINS_WITH_BULLET, ENDS_IN_ELLIPSIS, ENDS_IN_TERMINAL, IS_BLANK, Lines
from bessemer.data.text.texts import Texts
from bessemer.data.text.words import HAS_LETTER, IS_WORD

#: Digits of a stored score that comes from `exp`, `log` or a sum of floats: the last ones differ between processors, and
#: neither files nor limits may. Coarse enough for every error of those, fine enough for every limit.
_DECIMALS = 6


def rounded(scores: np.ndarray) -> pa.Array:
    """Scores as they are stored, float64."""
    # no negative zero
    return pa.array(np.round(scores, _DECIMALS).astype(np.float64) + 0.0)


def repeated(lines: Lines, considered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Repeated lines of each text, of those `considered` (K,) bool, and their characters: (N,) int64 each."""
    texts = len(lines.of_text) - 1
    size = table_size(int(lines.counts.max(initial=0)))
    keys, owners = np.empty(size, np.uint64), np.zeros(size, np.int64)
    counts, characters = np.zeros(texts, np.int64), np.zeros(texts, np.int64)
    _count_repeated(lines.hashes, lines.characters, considered, lines.of_text, keys, owners, counts, characters)
    return counts, characters


def table_size(entries: int) -> int:
    """Slots of a table for a number of entries: a power of two, half of which stay free."""
    return 1 << max(4, (2 * entries - 1).bit_length())


@compiled
def occupied(keys: np.ndarray, owners: np.ndarray, mask: int, key: np.uint64, owner: int) -> Any:
    """The slot of `key` among the keys of `owner`, or the first one free for it, of a table of `mask + 1` slots.

    A slot whose owner is another one is free: so a table is emptied by going on to the next owner.
    """
    slot = np.int64(key & np.uint64(mask))
    while owners[slot] == owner and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _count_repeated(
    hashes: np.ndarray,
    characters: np.ndarray,
    considered: np.ndarray,
    of_text: np.ndarray,
    keys: np.ndarray,
    owners: np.ndarray,
    counts: np.ndarray,
    repeated_characters: np.ndarray,
) -> None:
    mask = len(keys) - 1
    for text in range(len(of_text) - 1):
        for line in range(of_text[text], of_text[text + 1]):
            if not considered[line]:
                continue
            slot = occupied(keys, owners, mask, hashes[line], text + 1)
            if owners[slot] == text + 1:
                counts[text] += 1
                repeated_characters[text] += characters[line]
            else:
                owners[slot] = text + 1
                keys[slot] = hashes[line]


#: What `_measure_quality` counts in a text.
_COUNTED = _WORDS, _CHARACTERS, _WITH_LETTER, _STOP_WORDS, _HASHES, _ELLIPSES, _MORE_WORDS = range(7)

_HASH, _DOT, _ELLIPSIS = ord("#"), ord("."), np.frombuffer("…".encode(), np.uint8)


class QualityCounts(NamedTuple):
    """Counts in each text, (N,) int64."""

    #: with a character that is no punctuation
    words: np.ndarray
    #: of those words
    characters: np.ndarray
    words_and_marks: np.ndarray
    with_letter: np.ndarray
    #: further words that the words in scripts without spaces stand for
    unspaced_words: np.ndarray
    #: how many of `STOP_WORDS` occur, in lower case
    stop_words: np.ndarray
    hashes: np.ndarray
    ellipses: np.ndarray
    lines: np.ndarray
    bullet_lines: np.ndarray
    ellipsis_lines: np.ndarray


def measure_quality(texts: Texts) -> QualityCounts:
    """The counts for `gopher_quality`."""
    words, lines = texts.words, texts.unicode_lines
    counted = np.zeros((len(texts), len(_COUNTED)), np.int64)
    _measure_quality(words.hashes, words.characters, words.traits, words.of_text, _stop_words(), counted)
    _count_marks(texts.data, texts.offsets, counted)
    _count_unspaced(texts.data, words.starts, words.ends, words.traits, words.of_text, counted)
    return QualityCounts(
        words=counted[:, _WORDS],
        characters=counted[:, _CHARACTERS],
        words_and_marks=words.counts,
        with_letter=counted[:, _WITH_LETTER],
        unspaced_words=counted[:, _MORE_WORDS],
        stop_words=counted[:, _STOP_WORDS],
        hashes=counted[:, _HASHES],
        ellipses=counted[:, _ELLIPSES],
        lines=lines.counts,
        bullet_lines=lines.total(lines.traits & BEGINS_WITH_BULLET != 0),
        ellipsis_lines=lines.total(lines.traits & ENDS_IN_ELLIPSIS != 0),
    )


def _stop_words() -> np.ndarray:
    spelt = [np.frombuffer(word.encode(), np.uint8) for word in STOP_WORDS]
    return np.array([fnv_hash(word, 0, len(word)) for word in spelt], np.uint64)


@compiled
def _measure_quality(
    hashes: np.ndarray,
    characters: np.ndarray,
    traits: np.ndarray,
    of_text: np.ndarray,
    stop_words: np.ndarray,
    counted: np.ndarray,
) -> None:
    for text in range(len(of_text) - 1):
        seen = 0
        for word in range(of_text[text], of_text[text + 1]):
            if traits[word] & IS_WORD:
                counted[text, _WORDS] += 1
                counted[text, _CHARACTERS] += characters[word]
            if traits[word] & HAS_LETTER:
                counted[text, _WITH_LETTER] += 1
            # no stop word is longer
            if characters[word] <= 4:
                for number in range(len(stop_words)):
                    if hashes[word] == stop_words[number]:
                        seen |= 1 << number
        while seen:
            counted[text, _STOP_WORDS] += 1
            seen &= seen - 1


@compiled
def _count_unspaced(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, traits: np.ndarray, of_text: np.ndarray, counted: np.ndarray
) -> None:
    """For each run of characters that counts as one word though its script has no spaces, adds the estimated number of words in
    it, less one."""
    for text in range(len(of_text) - 1):
        for word in range(of_text[text], of_text[text + 1]):
            if not traits[word] & HAS_LETTER:
                continue
            ideographs, letters = 0, 0
            index = starts[word]
            while index < ends[word]:
                code, length = code_point(data, index)
                if is_without_spaces(code):
                    ideographs += code >= FIRST_IDEOGRAPH
                    letters += code < FIRST_IDEOGRAPH
                index += length
            counted[text, _MORE_WORDS] += max(ideographs // IDEOGRAPHS_PER_WORD + letters // LETTERS_PER_WORD - 1, 0)


@compiled
def _count_marks(data: np.ndarray, offsets: np.ndarray, counted: np.ndarray) -> None:
    """Every `#`, and every `…` or `...`, of which five dots are one and six are two."""
    for text in range(len(offsets) - 1):
        dots = hashes = ellipses = 0
        end = offsets[text + 1]
        for index in range(offsets[text], end):
            byte = data[index]
            hashes += byte == _HASH
            dots = dots + 1 if byte == _DOT else 0
            if dots == 3:
                ellipses, dots = ellipses + 1, 0
            elif byte == _ELLIPSIS[0] and data[index + 1] == _ELLIPSIS[1] and data[index + 2] == _ELLIPSIS[2]:
                ellipses += 1
        counted[text, _HASHES], counted[text, _ELLIPSES] = hashes, ellipses


_FIRST_DUPLICATE = 5
_LONGEST = 10
#: The hash of an n-gram is a polynomial of its words' hashes at this odd number.
_BASE = np.uint64(0x9E3779B97F4A7C15)


class RepetitionCounts(NamedTuple):
    """Counts in each text, (N,) int64. A line or paragraph counts as the same when it equals an earlier one of the text."""

    characters: np.ndarray
    paragraphs: np.ndarray
    same_paragraphs: np.ndarray
    #: of same paragraphs
    paragraph_characters: np.ndarray
    #: that are not empty
    lines: np.ndarray
    same_lines: np.ndarray
    #: of same lines
    line_characters: np.ndarray
    #: (N, 11), by n. Below 5: characters of the most frequent n-gram (of the first of several), with single spaces, times how
    #: often it occurs. From 5 on: of the words in n-grams that occurred before, read from left to right, each counted once.
    n_grams: np.ndarray


def measure_repetition(texts: Texts) -> RepetitionCounts:
    """The counts for `gopher_repetition`."""
    paragraphs, lines = texts.paragraphs, texts.lines
    present = lines.characters > 0
    same_paragraphs, paragraph_characters = repeated(paragraphs, np.ones(len(paragraphs), np.bool_))
    same_lines, line_characters = repeated(lines, present)
    return RepetitionCounts(
        texts.characters,
        paragraphs.counts,
        same_paragraphs,
        paragraph_characters,
        lines.total(present),
        same_lines,
        line_characters,
        _repeated_grams(texts),
    )


def _repeated_grams(texts: Texts) -> np.ndarray:
    """Characters of the most frequent n-gram (n < 5) or in repeated ones, (N, 11) int64, of each text and n."""
    words = texts.words
    longest = int(words.counts.max(initial=0))
    size = table_size(longest)
    measured = np.zeros((len(texts), _LONGEST + 1), np.int64)
    _measure_repetition(
        words.hashes,
        words.characters,
        words.of_text,
        (np.empty(size, np.uint64), np.zeros(size, np.int64), np.empty(size, np.int32), np.empty(size, np.int32)),
        np.empty(size, np.bool_),
        (np.empty(longest, np.int32), np.empty(longest, np.int32), np.empty(longest, np.uint64)),
        np.zeros(longest + 1, np.int64),
        measured,
    )
    return measured


@compiled
def _measure_repetition(
    hashes: np.ndarray,
    characters: np.ndarray,
    of_text: np.ndarray,
    table: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    passed: np.ndarray,
    places: tuple[np.ndarray, np.ndarray, np.ndarray],
    before: np.ndarray,
    measured: np.ndarray,
) -> None:
    """Fill `measured`. The other arrays are scratch space, used for one text after the other.

    table: of n-grams, key, owner, how often it occurs and where first. passed: whether a duplicate was read by already.
    places: where an n-gram may be repeated, in which slot it is, and its hash. before: characters before each word.
    """
    keys, owners, counts, firsts = table
    starts, slots, grams = places
    owner = 0
    for text in range(len(of_text) - 1):
        first, number = of_text[text], of_text[text + 1] - of_text[text]
        mask = 15
        while mask + 1 < 2 * number:
            mask = 2 * mask + 1
        for word in range(number):
            before[word + 1] = before[word] + characters[first + word]
            starts[word] = word
            grams[word] = hashes[first + word]
        candidates = number
        for n in range(2, min(_LONGEST, number) + 1):
            owner += 1
            most, most_first = 1, 0
            while candidates and starts[candidates - 1] + n > number:
                candidates -= 1
            for place in range(candidates):
                start = starts[place]
                grams[place] = grams[place] * _BASE + hashes[first + start + n - 1]
                slot = occupied(keys, owners, mask, grams[place], owner)
                slots[place] = slot
                if owners[slot] != owner:
                    owners[slot], keys[slot], counts[slot], firsts[slot] = owner, grams[place], 0, start
                    passed[slot] = False
                counts[slot] += 1
                if counts[slot] > most or (counts[slot] == most and firsts[slot] < most_first):
                    most, most_first = counts[slot], firsts[slot]
            repeated = 0
            # where the next duplicate may begin: duplicates do not overlap
            free = 0
            kept = 0
            for place in range(candidates):
                slot, start = slots[place], starts[place]
                if counts[slot] == 1:
                    continue
                starts[kept], grams[kept] = start, grams[place]
                kept += 1
                if start < free:
                    continue
                if passed[slot]:
                    repeated += before[start + n] - before[start]
                    free = start + n
                passed[slot] = True
            candidates = kept
            if n < _FIRST_DUPLICATE:
                repeated = most * (before[most_first + n] - before[most_first] + n - 1)
            measured[text, n] = repeated


class C4Counts(NamedTuple):
    """Counts in each text, (N,) int64. “lorem ipsum” counts in any case; sentences are `Texts.sentences`."""

    lorem_ipsum: np.ndarray
    curly_brackets: np.ndarray
    sentences: np.ndarray


def measure_c4(texts: Texts) -> C4Counts:
    """The counts for `c4`."""
    return C4Counts(_occurrences(texts.array, "lorem ipsum"), _occurrences(texts.array, "{"), texts.sentences.counts)


def _occurrences(array: pa.Array, pattern: str) -> np.ndarray:
    return pc.count_substring(array, pattern, ignore_case=True).to_numpy(zero_copy_only=False)


# characters
_SHORT_LINE = 30


class FineWebCounts(NamedTuple):
    r"""Counts in each text, (N,) int64. Lines are those that are not blank; characters are all but `\n`."""

    lines: np.ndarray
    punctuated_lines: np.ndarray
    short_lines: np.ndarray
    #: of lines equal to an earlier one
    same_characters: np.ndarray
    characters: np.ndarray
    newlines: np.ndarray
    words_and_marks: np.ndarray


def measure_fineweb(texts: Texts) -> FineWebCounts:
    """The counts for `fineweb`."""
    lines = texts.lines
    present = lines.traits & IS_BLANK == 0
    newlines = lines.counts - 1
    _, same_characters = repeated(lines, present)
    return FineWebCounts(
        lines.total(present),
        lines.total(lines.traits & ENDS_IN_TERMINAL != 0),
        lines.total(present & (lines.characters <= _SHORT_LINE)),
        same_characters,
        texts.characters - newlines,
        newlines,
        texts.words.counts,
    )
