"""How much of given texts stands in a corpus: the share of each text's n-grams of words that occur in any document.

Words are compared as in `decontaminate`. Documents are seen once, in batches; memory is that of the texts' n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.word_runs import hash_table, index_runs, place_of_run, powers_of_base, run_sizes, sized_runs
from bessemer.data.deduplication.words import hash_words, most_words, run_hashes
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts

# Shapes: G groups of texts, R n-grams of a group, each once, E different n-grams, T places of the table, L lengths.


class NgramOverlap:
    """The n-grams of groups of texts, and which of them documents have had so far."""

    def __init__(self, texts: Texts, groups: Sequence[int], *, ngram: int, least_words: int) -> None:
        """groups: of each text the number of its group, from 0. A text of fewer than `ngram` but at least `least_words` words
        is one n-gram, of all its words; a shorter one has none.

        Raises ValueError for a `least_words` below 1 or above `ngram`.
        """
        if not 1 <= least_words <= ngram:
            raise ValueError(f"least_words is from 1 to ngram, {ngram}, not {least_words}")
        self._ngram = ngram
        self._groups = max(groups, default=-1) + 1
        hashes, owners, lengths = index_runs(texts.data, texts.offsets, fold_table("words"), ngram, least_words)
        different_E, entries = np.unique(hashes, return_inverse=True)
        self._lengths_L = np.unique(lengths[lengths > 0])
        self._table_T, self._entries_T = hash_table(different_E, np.arange(len(different_E)))
        self._seen_E = np.zeros(len(different_E), dtype=np.bool_)
        group_of_run = np.asarray(groups, dtype=np.int64)[owners]
        pairs_R = np.unique(np.stack([group_of_run, entries]), axis=1)
        self._group_R, self._entry_R = pairs_R[0], pairs_R[1]

    def add(self, documents: Texts) -> None:
        """Take notice of a batch of documents."""
        _mark(
            documents.data,
            documents.offsets,
            fold_table("words"),
            self._lengths_L,
            self._ngram,
            self._table_T,
            self._entries_T,
            self._seen_E,
        )

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each group its different n-grams, and how many of them a document had: (G,) int64 each."""
        total_G = np.bincount(self._group_R, minlength=self._groups)
        seen_G = np.bincount(self._group_R[self._seen_E[self._entry_R]], minlength=self._groups)
        return total_G, seen_G


@compiled_allocating
def _mark(
    data: np.ndarray,
    offsets: np.ndarray,
    fold: np.ndarray,
    lengths: np.ndarray,
    ngram: int,
    table: np.ndarray,
    entries: np.ndarray,
    seen: np.ndarray,
) -> None:
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    words = np.empty(most_words(longest), dtype=np.uint64)
    places = np.empty((len(words), 2), dtype=np.int64)
    runs = np.empty(len(words), dtype=np.uint64)
    sizes = np.empty(len(words), dtype=np.int64)
    ends = np.empty(len(words), dtype=np.int64)
    powers = powers_of_base(ngram)
    for text in range(len(offsets) - 1):
        count, _ = hash_words(data, offsets[text], offsets[text + 1], fold, words, places, 0)
        run_sizes(data, fold, places, count, sizes)
        for kind in range(-1, len(lengths)):
            if kind < 0:
                total = sized_runs(words, sizes, count, ngram, powers, ends, runs)
            else:
                total = run_hashes(words, count, lengths[kind], runs)
            for run in range(total):
                entry = entries[place_of_run(table, entries, runs[run])]
                if entry >= 0:
                    seen[entry] = True
