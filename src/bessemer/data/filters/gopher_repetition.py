"""Scores `gopher_repetition`: Gopher's measures of repetition (Rae et al. 2021, section A.1.1 and table A1).

A text that says the same again and again was made by a machine, or is navigation. The measures are shares of a text's
lines and paragraphs that were there before, and of its characters that lie in them, in the most frequent n-gram of words,
and in n-grams that were there before.

An n-gram can only occur twice where the (n - 1)-gram that it begins with does. So of the places where a 2-gram stands,
only those whose 2-gram is repeated are looked at for 3-grams, and so on: the longest n-grams cost next to nothing.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import columns, occupied, ratio, repeated, table_size
from bessemer.data.text.compiled import compiled
from bessemer.data.text.texts import Texts

_TOP = (2, 3, 4)
_DUPLICATE = (5, 6, 7, 8, 9, 10)
_FIRST_DUPLICATE = 5
_LONGEST = 10
#: The hash of an n-gram is a polynomial of its words' hashes at this odd number.
_BASE = np.uint64(0x9E3779B97F4A7C15)


def gopher_repetition(texts: Texts) -> dict[str, pa.Array]:
    """The measures of each text, by column, all of them shares; zero for an empty text.

    `duplicate_lines` and `duplicate_paragraphs`: those equal to an earlier one (empty lines are none). `…_characters`: their
    characters, as a share of all. `top_n_gram`: characters of the most frequent one (of the first of several), with single
    spaces, times how often it occurs. `duplicate_n_grams`: characters of the words in n-grams that occurred before, read
    from left to right, each counted once.
    """
    paragraphs, lines = texts.paragraphs, texts.lines
    everything = np.ones(len(paragraphs), np.bool_)
    present = lines.characters > 0
    same_paragraphs, paragraph_characters = repeated(paragraphs, everything)
    same_lines, line_characters = repeated(lines, present)
    grams = _repeated_grams(texts)
    scores = {
        "duplicate_paragraphs": ratio(same_paragraphs, paragraphs.counts),
        "duplicate_paragraph_characters": ratio(paragraph_characters, texts.characters),
        "duplicate_lines": ratio(same_lines, lines.total(present)),
        "duplicate_line_characters": ratio(line_characters, texts.characters),
        **{f"top_{n}_gram": ratio(grams[:, n], texts.characters) for n in _TOP},
        **{f"duplicate_{n}_grams": ratio(grams[:, n], texts.characters) for n in _DUPLICATE},
    }
    return columns({f"gopher_repetition_{name}": score for name, score in scores.items()})


def _repeated_grams(texts: Texts) -> np.ndarray:
    """Characters of the most frequent n-gram (n < 5) or in repeated ones, (N, 11) int64, of each text and n."""
    words = texts.words
    longest = int(words.counts.max(initial=0))
    size = table_size(longest)
    measured = np.zeros((len(texts), _LONGEST + 1), np.int64)
    _measure(
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
def _measure(
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
