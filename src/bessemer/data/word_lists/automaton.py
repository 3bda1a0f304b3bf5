"""Aho-Corasick automaton: finds the terms of all lists in one pass over the bytes (Aho and Corasick 1975).

The automaton's table is dense over classes of bytes, so that a byte of text costs two look-ups whatever the number of
terms. `FoldedTerms` looks for words and phrases and reads a text as one would say it: without case, and with any run of
characters that are no letters or digits as one gap. `Literals` looks for the bytes as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bessemer.data.text.compiled import compiled, compiled_allocating

# class of bytes that separate words
_GAP = 0
# class of bytes that occur in no term
_OTHER = 1

#: Leading bytes and ranges of the code points beyond ASCII that separate words: C1 controls and Latin-1 punctuation
#: (but ª µ º), general punctuation, and the marks of Chinese and Japanese.
_LATIN, _GENERAL, _CJK = 0xC2, 0xE2, 0xE3


class Automaton(NamedTuple):
    """A dense Aho–Corasick automaton.

    `classes` (256,) gives each byte its class. `steps` (states, classes) holds `2 · next state`, plus one where that
    state ends a term. The terms that end in state s are `ended[first_ended[s]:first_ended[s + 1]]`.
    """

    classes: np.ndarray
    steps: np.ndarray
    first_ended: np.ndarray
    ended: np.ndarray

    @classmethod
    def of(cls, spellings: Sequence[tuple[bytes, int]], *, fold_case: bool, words: bool) -> Automaton:
        """Of spellings, each with the number of the term that it stands for.

        With `words`, bytes that are neither ASCII letters or digits nor above 127 are gaps: a space in a spelling.
        """
        used = sorted({byte for spelling, _ in spellings for byte in spelling if not (words and byte == 0x20)})
        classes = np.full(256, _OTHER, np.uint8)
        if words:
            classes[[byte for byte in range(128) if not chr(byte).isalnum()]] = _GAP
        for number, byte in enumerate(used, start=2):
            classes[byte] = number
        if fold_case:
            classes[ord("A") : ord("Z") + 1] = classes[ord("a") : ord("z") + 1]
        assert len(used) + 2 <= 256
        symbols = classes[np.frombuffer(b"".join(spelling for spelling, _ in spellings), np.uint8)]
        offsets = np.cumsum([0, *(len(spelling) for spelling, _ in spellings)])
        terms = np.array([term for _, term in spellings], np.int64)
        return cls(classes, *_table(symbols, offsets, terms, len(used) + 2))


@compiled_allocating
def _table(
    symbols: np.ndarray, offsets: np.ndarray, terms: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The trie of the spellings, with the step for every class filled in breadth first from the state to fall back to."""
    steps = np.zeros((len(symbols) + 1, width), np.int32)
    states = 1
    last_state = np.zeros(len(terms), np.int64)
    for number in range(len(terms)):
        state = 0
        for at in range(offsets[number], offsets[number + 1]):
            if steps[state, symbols[at]] == 0:
                steps[state, symbols[at]] = states
                states += 1
            state = steps[state, symbols[at]]
        last_state[number] = state
    steps = steps[:states].copy()

    own = np.bincount(last_state, minlength=states)
    # plus the terms of the fallback state, whose text is a suffix of this one's
    ends = own.copy()
    fallback = np.zeros(states, np.int64)
    waiting = np.empty(states, np.int64)
    waiting[0], read, written = 0, 0, 1
    while read < written:
        state = waiting[read]
        read += 1
        ends[state] += ends[fallback[state]] if state else 0
        for symbol in range(width):
            child = steps[state, symbol]
            otherwise = steps[fallback[state], symbol] if state else 0
            if child == 0:
                steps[state, symbol] = otherwise
            else:
                fallback[child] = otherwise
                waiting[written] = child
                written += 1

    first_ended = np.zeros(states + 1, np.int64)
    first_ended[1:] = np.cumsum(ends)
    ended = np.empty(first_ended[-1], np.int64)
    filled = first_ended[:-1].copy()
    for number in range(len(terms)):
        ended[filled[last_state[number]]] = terms[number]
        filled[last_state[number]] += 1
    for place in range(1, states):
        state = waiting[place]
        shorter = fallback[state]
        for inherited in range(first_ended[shorter], first_ended[shorter + 1]):
            ended[filled[state]] = ended[inherited]
            filled[state] += 1
    for state in range(states):
        for symbol in range(width):
            target = steps[state, symbol]
            steps[state, symbol] = 2 * target + (ends[target] > 0)
    return steps, first_ended, ended


_ASCII_GAP = re.compile(r"[^0-9A-Za-z]+")


class FoldedTerms:
    """Words and phrases, without case and punctuation; a star at either end lets the word go on there.

    Letters beyond ASCII are found in lower case, with a capital first, and in capitals.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        """From terms, numbered in their order. Raises ValueError for a term without a letter or digit."""
        spellings = [(spelling, number) for number, term in enumerate(terms) for spelling in _spellings(term)]
        self._automaton = Automaton.of(spellings, fold_case=True, words=True)

    def count(
        self, data: np.ndarray, offsets: np.ndarray, columns: np.ndarray, weights: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each text the weights of the terms found, summed by column: of every occurrence, and of each term once.

        `columns` and `weights` (terms,) give each term's column, below `width`, and weight. Both results are (N, width)
        float64.
        """
        return _count(data, offsets, self._automaton, columns.astype(np.int64), weights.astype(np.float64), width)


class Literals:
    """Byte strings as they are, or without regard to ASCII case; `lengths` in bytes, by number."""

    def __init__(self, literals: Sequence[bytes], *, fold_case: bool = False) -> None:
        spellings = [(text.lower() if fold_case else text, number) for number, text in enumerate(literals)]
        self._automaton = Automaton.of(spellings, fold_case=fold_case, words=False)
        self.lengths = np.array([len(text) for text in literals], np.int64)

    def find(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of literals (one past the last byte), in order, and the literals' numbers: two int64 arrays."""
        size = max(64, len(data) // 256)
        while True:
            ends, terms = np.empty(size, np.int64), np.empty(size, np.int64)
            count = _find(data, self._automaton, ends, terms)
            if count <= size:
                return ends[:count], terms[:count]
            size = count


def _spellings(term: str) -> list[bytes]:
    """How a term looks to the automaton: lower case, words apart by one space, a space at each end that has no star."""
    open_start, open_end = term.startswith("*"), term.endswith("*")
    spellings = []
    for variant in {term.lower(), term.lower().title(), term.upper()} if not term.isascii() else {term.lower()}:
        words = (_ASCII_GAP.sub(" ", variant) if variant.isascii() else "".join(map(_word_or_gap, variant))).split()
        if not words:
            raise ValueError(f"the term {term!r} has no letter or digit")
        text = ("" if open_start else " ") + " ".join(words) + ("" if open_end else " ")
        spellings.append("".join(c.lower() if c.isascii() else c for c in text).encode())
    return sorted(set(spellings))


def _word_or_gap(character: str) -> str:
    """A character that belongs to words, or a space; the compiled loop decides the same from the bytes."""
    data = np.frombuffer(character.encode() + b"\0\0", np.uint8)
    return character if (character.isalnum() if character.isascii() else _gap(data, 0, len(data)) == 0) else " "


@compiled
def _gap(data: np.ndarray, at: int, end: int) -> int:
    """The bytes of the non-ASCII character at `at` if it separates words, else 0."""
    lead = data[at]
    if at + 1 < end:
        second = data[at + 1]
        if lead == _LATIN and second != 0xAA and second != 0xB5 and second != 0xBA:
            return 2
        if lead == _GENERAL and (second == 0x80 or second == 0x81) and at + 2 < end:
            return 3
        if lead == _CJK and second == 0x80 and at + 2 < end:
            return 3
    return 0


@compiled_allocating
def _count(
    data: np.ndarray, offsets: np.ndarray, automaton: Automaton, columns: np.ndarray, weights: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    classes, steps, first_ended, ended = automaton
    texts = len(offsets) - 1
    occurrences = np.zeros((texts, width))
    distinct = np.zeros((texts, width))
    last_text = np.full(len(columns), -1)
    begin = steps[0, _GAP] >> 1
    for text in range(texts):
        state = begin
        at, end = offsets[text], offsets[text + 1]
        behind_gap = True
        while at <= end:
            step = 1
            # the text's end closes its last word
            symbol = np.uint8(_GAP)
            if at < end:
                byte = data[at]
                symbol = classes[byte]
                if byte >= 0xC2:
                    width_of_gap = _gap(data, at, end)
                    if width_of_gap > 0:
                        symbol, step = np.uint8(_GAP), width_of_gap
            at += step
            if symbol == _GAP:
                if behind_gap:
                    continue
                behind_gap = True
            else:
                behind_gap = False
            code = steps[state, symbol]
            state = code >> 1
            if code & 1:
                for place in range(first_ended[state], first_ended[state + 1]):
                    term = ended[place]
                    occurrences[text, columns[term]] += weights[term]
                    if last_text[term] != text:
                        last_text[term] = text
                        distinct[text, columns[term]] += weights[term]
    return occurrences, distinct


@compiled
def _find(data: np.ndarray, automaton: Automaton, ends: np.ndarray, terms: np.ndarray) -> int:
    """Fill `ends` and `terms` as far as they reach; return how many there are."""
    classes, steps, first_ended, ended = automaton
    count = 0
    state = 0
    for at in range(len(data)):
        code = steps[state, classes[data[at]]]
        state = code >> 1
        if code & 1:
            for place in range(first_ended[state], first_ended[state + 1]):
                if count < len(ends):
                    ends[count] = at + 1
                    terms[count] = ended[place]
                count += 1
    return count
