"""Scores `gopher_quality`: Gopher's measures of quality (Rae et al. 2021, section A.1.1).

Words, lines and marks are counted as datatrove counts them, whose verdicts the limits are known by: words are those of
`text.words`, so that punctuation marks are words of their own; those of symbols alone count for shares and not for
`gopher_words`; lines are those of `str.splitlines`, blank ones among them. Ratios are zero in a text without words. Where a
script puts no spaces between words, the share of words with a letter goes by how many words the letters come to.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import columns, ratio
from bessemer.data.text.compiled import compiled
from bessemer.data.text.lines import BEGINS_WITH_BULLET, ENDS_IN_ELLIPSIS
from bessemer.data.text.scripts import FIRST_IDEOGRAPH, IDEOGRAPHS_PER_WORD, LETTERS_PER_WORD, is_without_spaces
from bessemer.data.text.tables import hash_bytes
from bessemer.data.text.texts import Texts
from bessemer.data.text.utf8 import code_point
from bessemer.data.text.words import HAS_LETTER, IS_WORD

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


#: What `_measure` counts in a text.
_WORDS, _CHARACTERS, _WITH_LETTER, _STOP_WORDS, _HASHES, _ELLIPSES, _MORE_WORDS = range(7)

_HASH, _DOT, _ELLIPSIS = ord("#"), ord("."), np.frombuffer("…".encode(), np.uint8)


def gopher_quality(texts: Texts) -> dict[str, pa.Array]:
    """The measures of each text, by column.

    `words` (those that have a character beside punctuation) and `stop_words` (how many of the eight occur, in lower case)
    are counts, `mean_word_length` is in characters; `hashes_per_word` and `ellipses_per_word` are occurrences of `#` and
    of `…` or `...` per word or mark, `words_with_letter` is a share of those; the others are shares of lines (that begin
    with `•` or `-`, that end in an ellipsis).
    """
    words, lines = texts.words, texts.unicode_lines
    counted = np.zeros((len(texts), 7), np.int64)
    _measure(words.hashes, words.characters, words.traits, words.of_text, _stop_words(), counted)
    _count_marks(texts.data, texts.offsets, counted)
    _count_unspaced(texts.data, words.starts, words.ends, words.traits, words.of_text, counted)
    more = counted[:, _MORE_WORDS]
    return columns(
        {
            "gopher_words": counted[:, _WORDS],
            "gopher_mean_word_length": ratio(counted[:, _CHARACTERS], counted[:, _WORDS]),
            "gopher_hashes_per_word": ratio(counted[:, _HASHES], words.counts),
            "gopher_ellipses_per_word": ratio(counted[:, _ELLIPSES], words.counts),
            "gopher_bullet_lines": ratio(lines.total(lines.traits & BEGINS_WITH_BULLET != 0), lines.counts),
            "gopher_ellipsis_lines": ratio(lines.total(lines.traits & ENDS_IN_ELLIPSIS != 0), lines.counts),
            "gopher_words_with_letter": ratio(counted[:, _WITH_LETTER] + more, words.counts + more),
            "gopher_stop_words": counted[:, _STOP_WORDS],
        }
    )


def _stop_words() -> np.ndarray:
    spelt = [np.frombuffer(word.encode(), np.uint8) for word in STOP_WORDS]
    return np.array([hash_bytes(word, 0, len(word)) for word in spelt], np.uint64)


@compiled
def _measure(
    hashes: np.ndarray,
    characters: np.ndarray,
    traits: np.ndarray,
    of_text: np.ndarray,
    stop_words: np.ndarray,
    counted: np.ndarray,
) -> None:
    for text in range(len(of_text) - 1):
        found = 0
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
                        found |= 1 << number
        while found:
            counted[text, _STOP_WORDS] += 1
            found &= found - 1


@compiled
def _count_unspaced(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, traits: np.ndarray, of_text: np.ndarray, counted: np.ndarray
) -> None:
    """How many words more than one each the words in scripts without spaces come to."""
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
