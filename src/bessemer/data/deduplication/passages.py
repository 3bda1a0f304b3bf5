"""Repeated passages: lines, paragraphs, sentences and runs of words that several documents hold, kept in the preferred one.

Passages are compared by their words: lower case, every number as 0, no accents, no punctuation. One with fewer than
`least_words` words is left alone; two characters of Chinese and Japanese, or five letters of Thai and its like, count as a
word. A document may repeat itself.

Repeated substrings of at least `length` words (Lee et al. 2022) are found without a suffix array: a word lies in one exactly
when it lies in a run of `length` words that occurs twice. Runs are hashed (64 bits) and partitioned by an anchor, the smallest
hash among a run's shorter runs (winnowing, Schleimer et al. 2003), so that nothing of the corpus's size is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bessemer.data.deduplication.corpus import Corpus, Parts, Sketch, first_of_groups, groups_of_equal
from bessemer.data.deduplication.removals import SpanCollector, SpanRemovals, span_type
from bessemer.data.deduplication.words import fold_table, hash_words, length_in_words, most_words, run_hash, run_hashes
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.lines import Spans
from bessemer.data.text.texts import Texts

Unit = Literal["line", "paragraph", "sentence"]

_PARTS = 64
# an estimate, for the size of the sketch
_PASSAGES_PER_DOCUMENT = 64


@dataclass(frozen=True)
class Passages:
    """P passages of a batch: hashes (P,) uint64, the text's row (P,) int64, and bounds (P, 2) int64 in bytes of the text."""

    hashes: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray


def repeated_lines(corpus: Corpus, scratch: Path, *, least_words: int = 6, least_words_left: int = 10) -> SpanRemovals:
    """Lines that are in another document with a smaller id. A cut document with fewer than `least_words_left` is dropped."""
    return _repeated(corpus, scratch, "line", 1, least_words, "too little left without repeated lines", least_words_left)


def repeated_paragraphs(corpus: Corpus, scratch: Path, *, least_words: int = 6, least_words_left: int = 10) -> SpanRemovals:
    """Paragraphs, which blank lines part, that are in another document with a smaller id."""
    wording = "too little left without repeated paragraphs"
    return _repeated(corpus, scratch, "paragraph", 1, least_words, wording, least_words_left)


def repeated_sentences(
    corpus: Corpus, scratch: Path, *, span: int = 3, least_words: int = 6, least_words_left: int = 10
) -> SpanRemovals:
    """Runs of `span` sentences in a row that are in another document with a smaller id (as C4 did; Raffel et al. 2020)."""
    wording = "too little left without repeated sentences"
    return _repeated(corpus, scratch, "sentence", span, least_words, wording, least_words_left)


def _repeated(
    corpus: Corpus, scratch: Path, unit: Unit, span: int, least_words: int, wording: str, least_words_left: int
) -> SpanRemovals:
    """Two readings: the first counts hashes in a sketch, the second puts on disk what may have come twice, to be grouped."""
    sketch = Sketch(len(corpus) * _PASSAGES_PER_DOCUMENT)
    for _, texts in corpus.texts():
        sketch.add(passages(texts, unit, span, least_words).hashes)
    collector = SpanCollector(corpus, scratch)
    kind = np.dtype([("hash", "<u8"), ("number", corpus.number_type), ("start", "<u4"), ("end", "<u4")])
    with Parts(scratch / "passages", kind, _PARTS) as parts:
        for numbers, texts in corpus.texts():
            batch = passages(texts, unit, span, least_words)
            again = sketch.repeated(batch.hashes)
            records = np.empty(int(again.sum()), dtype=kind)
            records["hash"], records["number"] = batch.hashes[again], numbers[batch.rows[again]]
            records["start"], records["end"] = batch.bounds[again].T
            parts.add(records, records["hash"] % np.uint64(_PARTS))
        for records in parts:
            rows, groups = groups_of_equal(records["hash"], records["number"])
            owners = records["number"][rows[first_of_groups(groups)]]
            copies = records[rows[records["number"][rows] != owners]]
            spans = np.zeros(len(copies), dtype=span_type(corpus))
            for name in ("number", "start", "end"):
                spans[name] = copies[name]
            collector.add(spans)
    return collector.close(wording, least_words_left)


def passages(texts: Texts, unit: Unit, span: int = 1, least_words: int = 1) -> Passages:
    """All runs of `span` units in a row with at least `least_words` words; units without words do not count as units.

    Units are `texts.lines`, `texts.paragraphs` or `texts.sentences`.
    """
    units: Spans = getattr(texts, f"{unit}s")
    longest = int((units.ends - units.starts).max(initial=0))
    words = np.empty(most_words(longest) * span + 1, dtype=np.uint64)
    hashes = np.empty(len(units), dtype=np.uint64)
    places = np.empty((len(units), 3), dtype=np.int64)
    count = _passages(
        texts.data,
        texts.offsets,
        units.starts,
        units.ends,
        units.of_text,
        fold_table("similar"),
        words,
        np.empty((span, 2), dtype=np.int64),
        least_words,
        hashes,
        places,
    )
    return Passages(hashes[:count], places[:count, 0], places[:count, 1:])


@compiled
def _passages(
    data: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    of_text: np.ndarray,
    fold: np.ndarray,
    words: np.ndarray,
    ring: np.ndarray,
    least_words: int,
    hashes: np.ndarray,
    places: np.ndarray,
) -> int:
    """Fills hashes (M,) and places (M, 3) and returns how many there are.

    words holds those of the run that is read; ring (span, 2) is scratch for where each of the last `span` units begins: its
    first byte and its first word.
    """
    span = len(ring)
    nowhere = places[:0, :2]
    filled = 0
    for text in range(len(of_text) - 1):
        count = units = 0
        for unit in range(of_text[text], of_text[text + 1]):
            before = count
            count, _ = hash_words(data, starts[unit], ends[unit], fold, words, nowhere, count)
            if count == before:
                continue
            ring[units % span, 0], ring[units % span, 1] = starts[unit], before
            units += 1
            if units < span:
                continue
            begin = ring[units % span, 0]
            if count >= least_words and length_in_words(data, begin, ends[unit], fold, count) >= least_words:
                hashes[filled] = run_hash(words, 0, count)
                places[filled, 0] = text
                places[filled, 1], places[filled, 2] = begin - offsets[text], ends[unit] - offsets[text]
                filled += 1
            # drop the words of the run's first unit
            leaving = ring[(units + 1) % span, 1] if span > 1 else count
            for word in range(count - leaving):
                words[word] = words[word + leaving]
            count -= leaving
            for place in range(span):
                ring[place, 1] -= leaving
    return filled


# an estimate, for the size of the sketch
_ANCHORS_PER_DOCUMENT = 64


def repeated_substrings(corpus: Corpus, scratch: Path, *, length: int = 50, least_words_left: int = 10) -> SpanRemovals:
    """Runs of at least `length` words, as white space parts them, that stand at an earlier place word for word.

    A cut document with fewer than `least_words_left` words is dropped: `too little left without repeated substrings`.
    """
    sketch = Sketch(len(corpus) * _ANCHORS_PER_DOCUMENT)
    for _, texts in corpus.texts():
        sketch.add(_anchors(texts, length))
    collector = SpanCollector(corpus, scratch)
    kind = np.dtype([("hash", "<u8"), ("number", corpus.number_type), *((name, "<u4") for name in ("start", "end", "after"))])
    with Parts(scratch / "runs", kind, _PARTS) as parts:
        for numbers, texts in corpus.texts():
            hashes, anchors, places = runs(texts, length)
            again = sketch.repeated(anchors)
            records = np.empty(int(again.sum()), dtype=kind)
            records["hash"], records["number"] = hashes[again], numbers[places[again, 0]]
            records["start"], records["end"], records["after"] = places[again, 1:4].T
            parts.add(records, records["hash"] % np.uint64(_PARTS))
        for records in parts:
            rows, groups = groups_of_equal(records["hash"], records["number"], records["start"])
            spans = np.zeros(len(rows), dtype=span_type(corpus))
            is_first = first_of_groups(groups) == np.arange(len(rows))
            spans["number"], spans["start"], spans["keep"] = records["number"][rows], records["start"][rows], is_first
            # a kept span ends where the next word begins, so that nothing between two kept spans is cut, not even a space
            spans["end"] = np.where(is_first, records["after"][rows], records["end"][rows])
            collector.add(spans)
    return collector.close("too little left without repeated substrings", least_words_left)


def runs(texts: Texts, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs of `length` words: hashes (R,) uint64, anchors (R,) uint64, places (R, 5) int64.

    A place is the text's row, the run's first byte in it, the one after its last, the first of the next word (or the text's
    end), and the index of the anchor's first word.
    """
    capacity = max(1024, int(texts.offsets[-1] - texts.offsets[0]) // 5)
    while True:
        hashes, anchors = np.empty(capacity, dtype=np.uint64), np.empty(capacity, dtype=np.uint64)
        places = np.empty((capacity, 5), dtype=np.int64)
        count = _runs(texts.data, texts.offsets, fold_table("exact"), length, hashes, anchors, places)
        if count <= capacity:
            return hashes[:count], anchors[:count], places[:count]
        capacity = count


def _anchors(texts: Texts, length: int) -> np.ndarray:
    """Anchors of all runs, those that several neighbours share once."""
    _, anchors, places = runs(texts, length)
    new = np.ones(len(anchors), dtype=bool)
    new[1:] = (places[1:, 0] != places[:-1, 0]) | (places[1:, 4] != places[:-1, 4])
    return anchors[new]


@compiled_allocating
def _runs(
    data: np.ndarray,
    offsets: np.ndarray,
    fold: np.ndarray,
    length: int,
    hashes: np.ndarray,
    anchors: np.ndarray,
    places: np.ndarray,
) -> int:
    """Fills hashes (M,), anchors (M,) and places (M, 5) as far as they go and returns how many runs there are."""
    words = np.empty(most_words(longest_text(offsets)), dtype=np.uint64)
    bounds = np.empty((len(words), 2), dtype=np.int64)
    long = np.empty(len(words), dtype=np.uint64)
    short = np.empty(len(words), dtype=np.uint64)
    short_length = length // 2
    # how many shorter runs a run has
    window = length - short_length + 1
    filled = 0
    for text in range(len(offsets) - 1):
        base = offsets[text]
        count, _ = hash_words(data, base, offsets[text + 1], fold, words, bounds, 0)
        total = run_hashes(words, count, length, long)
        if total == 0:
            continue
        run_hashes(words, count, short_length, short)
        anchor = -1
        for run in range(total):
            last = run + window - 1
            # the anchor has left the window
            if anchor < run:
                anchor = run
                for index in range(run + 1, last + 1):
                    if short[index] < short[anchor]:
                        anchor = index
            elif short[last] < short[anchor]:
                anchor = last
            if filled < len(hashes):
                hashes[filled], anchors[filled] = long[run], short[anchor]
                places[filled, 0], places[filled, 4] = text, anchor
                places[filled, 1], places[filled, 2] = bounds[run, 0] - base, bounds[run + length - 1, 1] - base
                places[filled, 3] = (bounds[run + length, 0] if run + length < count else offsets[text + 1]) - base
            filled += 1
    return filled
