"""Sentences, gathered from words."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.compiled import compiled
from bessemer.data.text.lines import characters_of
from bessemer.data.text.spans import Spans
from bessemer.data.text.words import BEGINS_LINE, ENDS_SENTENCE, IS_PUNCTUATION, Words


def find_sentences(data: np.ndarray, words: Words) -> Spans:
    """The sentences of each text.

    One ends at the line's end, or with a mark such as `.`, `!` or `?` that is a word of its own (the full stop of `e.g.`
    is not), and with the punctuation behind it.
    """
    most = len(words)
    starts, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    characters, of_text = np.empty(most, np.int32), np.zeros(len(words.of_text), np.int64)
    count = _gather(data, words.starts, words.ends, words.traits, words.of_text, starts, ends, characters, of_text)
    return Spans(starts[:count], ends[:count], of_text, characters[:count])


@compiled
def _gather(
    data: np.ndarray,
    word_starts: np.ndarray,
    word_ends: np.ndarray,
    traits: np.ndarray,
    words_of_text: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    characters: np.ndarray,
    of_text: np.ndarray,
) -> int:
    count = 0
    for text in range(len(words_of_text) - 1):
        is_over = False
        for word in range(words_of_text[text], words_of_text[text + 1]):
            kind = traits[word]
            begins = kind & BEGINS_LINE or (is_over and not kind & (IS_PUNCTUATION | ENDS_SENTENCE))
            if begins:
                is_over = False
                starts[count] = word_starts[word]
                count += 1
            if kind & ENDS_SENTENCE:
                is_over = True
            ends[count - 1] = word_ends[word]
        of_text[text + 1] = count
    for sentence in range(count):
        characters[sentence] = characters_of(data, starts[sentence], ends[sentence])
    return count
