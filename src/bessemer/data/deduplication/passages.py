"""Repeated passages: lines, paragraphs and runs of sentences of several documents, which stay in the preferred one.

Units are cut as the filters cut them. Two passages are the same when their words are, in lower case, with every number as 0
and without accents and punctuation. A passage with fewer than `least_words` words is left alone: a brace or "Returns:" is no
copy; of Chinese and Japanese two characters count as a word, of Thai and its like five letters. A document may repeat itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.removals import SpanCollector, SpanRemovals, span_type
from bessemer.data.deduplication.spill import Parts, Sketch, first_of_groups, groups_of_equal
from bessemer.data.deduplication.words import hash_words, length_in_words, most_words, run_hash
from bessemer.data.text.compiled import compiled
from bessemer.data.text.spans import Spans
from bessemer.data.text.texts import Texts

Unit = Literal["line", "paragraph", "sentence"]

_PARTS = 64
# a guess, for the size of the sketch
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
            found = passages(texts, unit, span, least_words)
            again = sketch.repeated(found.hashes)
            records = np.empty(int(again.sum()), dtype=kind)
            records["hash"], records["number"] = found.hashes[again], numbers[found.rows[again]]
            records["start"], records["end"] = found.bounds[again].T
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
    found = 0
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
                hashes[found] = run_hash(words, 0, count)
                places[found, 0] = text
                places[found, 1], places[found, 2] = begin - offsets[text], ends[unit] - offsets[text]
                found += 1
            # the run's first unit is done with
            leaving = ring[(units + 1) % span, 1] if span > 1 else count
            for word in range(count - leaving):
                words[word] = words[word + leaving]
            count -= leaving
            for place in range(span):
                ring[place, 1] -= leaving
    return found
