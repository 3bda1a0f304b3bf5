"""Lines, paragraphs and spans of sentences that other documents have too: they stay in the one with the smallest id.

Two passages are the same when their words are, in lower case, with every number as 0 and without accents and punctuation.
A passage with fewer than `least_words` words is left alone: a brace or "Returns:" is no copy. A document may repeat itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numba import njit

from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.spill import Parts, Sketch, first_of_groups, groups_of_equal
from bessemer.data.deduplication.verdicts import PIECE, CutCollector, Cuts
from bessemer.data.deduplication.words import hash_words, is_white, most_words, run_hash
from bessemer.data.text.texts import Texts

Unit = Literal["line", "paragraph", "sentence"]

_UNITS: dict[Unit, int] = {"line": 0, "paragraph": 1, "sentence": 2}
_LINE, _PARAGRAPH, _SENTENCE = 0, 1, 2
_RECORD = np.dtype([("hash", "<u8"), ("number", "<u4"), ("start", "<u4"), ("end", "<u4")])
_PARTS = 64
_PASSAGES_PER_DOCUMENT = 64  # a guess, for the size of the sketch


@dataclass(frozen=True)
class Passages:
    """P passages of a batch: hashes (P,) uint64, the text's row (P,) int64, and bounds (P, 2) int64 in bytes of the text."""

    hashes: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray


def repeated_lines(corpus: Corpus, scratch: Path, *, least_words: int = 6, least_words_left: int = 10) -> Cuts:
    """Lines that are in another document with a smaller id. A cut document with fewer than `least_words_left` is dropped."""
    return _repeated(corpus, scratch, "line", 1, least_words, "too little left without repeated lines", least_words_left)


def repeated_paragraphs(corpus: Corpus, scratch: Path, *, least_words: int = 6, least_words_left: int = 10) -> Cuts:
    """Paragraphs, which blank lines part, that are in another document with a smaller id."""
    wording = "too little left without repeated paragraphs"
    return _repeated(corpus, scratch, "paragraph", 1, least_words, wording, least_words_left)


def repeated_sentences(
    corpus: Corpus, scratch: Path, *, span: int = 3, least_words: int = 6, least_words_left: int = 10
) -> Cuts:
    """Runs of `span` sentences in a row that are in another document with a smaller id (as C4 did; Raffel et al. 2020)."""
    wording = "too little left without repeated sentences"
    return _repeated(corpus, scratch, "sentence", span, least_words, wording, least_words_left)


def _repeated(
    corpus: Corpus, scratch: Path, unit: Unit, span: int, least_words: int, wording: str, least_words_left: int
) -> Cuts:
    """Two readings: the first counts hashes in a sketch, the second puts on disk what may have come twice, to be grouped."""
    sketch = Sketch(len(corpus) * _PASSAGES_PER_DOCUMENT)
    for _, texts in corpus.texts():
        sketch.add(passages(texts, unit, span, least_words).hashes)
    collector = CutCollector(corpus, scratch)
    with Parts(scratch / "passages", _RECORD, _PARTS) as parts:
        for numbers, texts in corpus.texts():
            found = passages(texts, unit, span, least_words)
            again = sketch.repeated(found.hashes)
            records = np.empty(int(again.sum()), dtype=_RECORD)
            records["hash"], records["number"] = found.hashes[again], numbers[found.rows[again]]
            records["start"], records["end"] = found.bounds[again].T
            parts.add(records, records["hash"] % np.uint64(_PARTS))
        for records in parts:
            rows, groups = groups_of_equal(records["hash"], records["number"])
            owners = records["number"][rows[first_of_groups(groups)]]
            copies = records[rows[records["number"][rows] != owners]]
            pieces = np.zeros(len(copies), dtype=PIECE)
            for name in ("number", "start", "end"):
                pieces[name] = copies[name]
            collector.add(pieces)
    return collector.close(wording, least_words_left)


def passages(texts: Texts, unit: Unit, span: int = 1, least_words: int = 1) -> Passages:
    """All runs of `span` units in a row with at least `least_words` words; units without words do not count as units.

    A line ends behind its newline, a paragraph behind the blank lines after it. A sentence ends behind the marks `.`, `!`, `?`
    and `…`, with closing quotes and brackets, where white space follows, behind a full-width mark, or at a line's end.
    """
    size = int(texts.offsets[-1] - texts.offsets[0])
    capacity = max(1024, size // 16)
    while True:
        hashes = np.empty(capacity, dtype=np.uint64)
        places = np.empty((capacity, 3), dtype=np.int64)
        count = _passages(texts.data, texts.offsets, fold_table("similar"), _UNITS[unit], span, least_words, hashes, places)
        if count <= capacity:
            return Passages(hashes[:count], places[:count, 0], places[:count, 1:])
        capacity = count


@njit(cache=True, nogil=True)
def _passages(
    data: np.ndarray,
    offsets: np.ndarray,
    fold: np.ndarray,
    unit: int,
    span: int,
    least_words: int,
    hashes: np.ndarray,
    places: np.ndarray,
) -> int:
    """Fills hashes (M,) and places (M, 3) as far as they go and returns how many there are."""
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    words = np.empty(most_words(longest), dtype=np.uint64)
    nowhere = np.empty((0, 2), dtype=np.int64)
    starts = np.empty(span, dtype=np.int64)  # of the last `span` units, as a ring: first byte, first word
    firsts = np.empty(span, dtype=np.int64)
    found = 0
    for text in range(len(offsets) - 1):
        base, stop = offsets[text], offsets[text + 1]
        position = base
        count = units = 0
        while position < stop:
            end = _unit_end(data, position, stop, unit)
            before = count
            count, _ = hash_words(data, position, end, fold, words, nowhere, count)
            if count > before:
                starts[units % span], firsts[units % span] = position, before
                units += 1
                first = firsts[units % span]
                if units >= span and count - first >= least_words:
                    if found < len(hashes):
                        hashes[found] = run_hash(words, first, count - first)
                        places[found, 0], places[found, 1], places[found, 2] = text, starts[units % span] - base, end - base
                    found += 1
            position = end
            if unit == _SENTENCE:
                while position < stop and is_white(data[position]):
                    position += 1
    return found


_NEWLINE = ord("\n")


@njit(cache=True, nogil=True)
def _unit_end(data: np.ndarray, position: int, stop: int, unit: int) -> int:
    """Where the unit that begins at `position` ends: the byte after its last."""
    if unit == _SENTENCE:
        return _sentence_end(data, position, stop)
    while position < stop and data[position] != _NEWLINE:
        position += 1
    position = min(position + 1, stop)
    if unit == _LINE:
        return position
    # a paragraph goes on to the first blank line, and over all blank lines
    blank = False
    while position < stop:
        line_end = position
        is_blank = True
        while line_end < stop and data[line_end] != _NEWLINE:
            is_blank = is_blank and is_white(data[line_end])
            line_end += 1
        if blank and not is_blank:
            break
        blank = is_blank
        position = min(line_end + 1, stop)
    return position


_MARKS = np.zeros(256, dtype=np.bool_)
_MARKS[[ord(mark) for mark in ".!?"]] = True
_CLOSING = np.zeros(256, dtype=np.bool_)
_CLOSING[[ord(mark) for mark in ".!?\"')]}"]] = True


@njit(cache=True, nogil=True)
def _sentence_end(data: np.ndarray, position: int, stop: int) -> int:
    while position < stop:
        byte = data[position]
        if byte == _NEWLINE:
            return position
        after = position + 1
        if _MARKS[byte]:
            while after < stop and (_CLOSING[data[after]] or _is_closing_quote(data, after, stop)):
                after += 1 if data[after] < 128 else 3
            if after >= stop or is_white(data[after]):
                return after
        elif byte >= 0xE2 and position + 3 <= stop:
            kind = _wide_mark(data[position], data[position + 1], data[position + 2])
            if kind == 2 or (kind == 1 and (position + 3 == stop or is_white(data[position + 3]))):
                return position + 3
        position = after
    return stop


@njit(cache=True, nogil=True)
def _is_closing_quote(data: np.ndarray, position: int, stop: int) -> bool:
    """Whether one of ’ ” stands here."""
    return (
        position + 3 <= stop
        and data[position] == 0xE2
        and data[position + 1] == 0x80
        and (data[position + 2] == 0x99 or data[position + 2] == 0x9D)
    )


@njit(cache=True, nogil=True)
def _wide_mark(first: int, second: int, third: int) -> int:
    """Of three bytes: 2 for 。！？, which end a sentence by themselves, 1 for …, which does before white space, else 0."""
    if first == 0xE3 and second == 0x80 and third == 0x82:
        return 2
    if first == 0xEF and second == 0xBC and (third == 0x81 or third == 0x9F):
        return 2
    return 1 if first == 0xE2 and second == 0x80 and third == 0xA6 else 0
