"""Repeated substrings: passages of at least `length` words that occur twice in the corpus, word for word (Lee et al. 2022).

A suffix array finds the maximal repeated substrings of at least L words. The same words are found without one: a word lies in
such a substring exactly when it lies in a run of L words that occurs twice, for every run of L words in a repeated substring is
itself repeated. So all runs of L words are hashed (64 bits) and grouped; that streams and needs no array over the corpus.

To hash every run on disk would take 24 bytes a word. Of each run the smallest hash among its shorter runs of L/2 words is its
anchor (winnowing, Schleimer et al. 2003): runs that are equal have equal anchors, and neighbours mostly share one, so a first
reading counts a few anchors in a sketch, and only runs whose anchor came twice are put on disk in the second.

The first place of each repeated run, by id and position, stays whole; the words of its other places are cut out, unless they
belong to the first place of another. So no repeated run is lost from the corpus, whatever overlaps what.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.removals import SpanCollector, SpanRemovals, span_type
from bessemer.data.deduplication.spill import Parts, Sketch, first_of_groups, groups_of_equal
from bessemer.data.deduplication.words import hash_words, most_words, run_hashes
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts

_PARTS = 64
# a guess, for the size of the sketch
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
            # what is kept ends where the next word begins: between two kept spans nothing is to be cut, not even a space
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
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    words = np.empty(most_words(longest), dtype=np.uint64)
    bounds = np.empty((len(words), 2), dtype=np.int64)
    long = np.empty(len(words), dtype=np.uint64)
    short = np.empty(len(words), dtype=np.uint64)
    short_length = length // 2
    # shorter runs in a run
    window = length - short_length + 1
    found = 0
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
            # it has left the window
            if anchor < run:
                anchor = run
                for index in range(run + 1, last + 1):
                    if short[index] < short[anchor]:
                        anchor = index
            elif short[last] < short[anchor]:
                anchor = last
            if found < len(hashes):
                hashes[found], anchors[found] = long[run], short[anchor]
                places[found, 0], places[found, 4] = text, anchor
                places[found, 1], places[found, 2] = bounds[run, 0] - base, bounds[run + length - 1, 1] - base
                places[found, 3] = (bounds[run + length, 0] if run + length < count else offsets[text + 1]) - base
            found += 1
    return found
