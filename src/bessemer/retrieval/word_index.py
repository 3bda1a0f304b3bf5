"""BM25 over rows of text: an index in a folder, which is built once and then only read.

Each term has its postings: the rows that hold it, in order, and what it adds to their scores, computed when the index is built.
A query adds up the postings of its terms. So a score depends on the rows and on the query alone: not on how many hits are
wanted, nor on a filter. The files are raw arrays, mapped into memory and read where a query needs them:

- `terms.bin`: (V,) uint64, hashes of the terms, ascending
- `starts.bin`: (V + 1,) int64, where the postings of each begin
- `rows.bin`, `scores.bin`: (P,) int32 and float32, the postings
- `words.json`, written last: the format, the version of the terms (`terms.py`) and the sizes

Terms are compared by their hashes of 64 bits: of a million terms, two share one with a probability of 3·10⁻⁸.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bessemer.core.errors import ArtefactError, writing_to
from bessemer.core.store import check_format, read_json, write_json
from bessemer.retrieval.terms import TERMS_VERSION, is_plain, parts_of_name, terms_of, words_of_text

#: BM25's k₁ and b.
K1, B = 1.2, 0.75
_FORMAT, _HEAD = 1, "words.json"
_KINDS = {"terms": np.uint64, "starts": np.int64, "rows": np.int32, "scores": np.float32}
#: Postings that are written at once: 8 bytes each. Words whose terms are remembered.
_POSTINGS_AT_ONCE, _REMEMBERED = 16_000_000, 500_000
_ALL_ROWS = np.empty(0, np.bool_)


class WordIndex:
    """An index that is read. Its searches may run in several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtefactError where the folder holds no whole index."""
        if not (folder / _HEAD).exists():
            raise ArtefactError(f"{folder}: the words of this index are missing; index the documents again")
        head = read_json(folder / _HEAD, "index of words")
        check_format(head.get("format"), _FORMAT, folder / _HEAD, "index of words")
        self.size = int(head["size"])
        #: Whether its texts were divided into terms as queries are now.
        self.is_current = head.get("terms_version", 1) == TERMS_VERSION
        arrays: dict[str, Any] = {}
        for name, kind in _KINDS.items():
            path, count = folder / f"{name}.bin", int(head[name])
            if not path.exists() or path.stat().st_size != count * np.dtype(kind).itemsize:
                raise ArtefactError(f"{path}: this file is damaged; index the documents again")
            # a file of no bytes cannot be mapped
            arrays[name] = np.memmap(path, kind, "r").view(np.ndarray) if count else np.empty(0, kind)
        self._starts, self._rows, self._scores = arrays["starts"], arrays["rows"], arrays["scores"]
        # searched for every query
        self._terms = np.array(arrays["terms"])
        self._known: dict[str, tuple[tuple[int, ...], bool]] = {}

    def rank(self, query: str, count: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows that hold words of a query, the best by BM25 first: rows and scores, (`count`,) or fewer.

        Stop words are left out, unless there are no others. allowed: (N,), of the rows that may be found; None: all.
        """
        words = [self._known.get(word) or self._look_up(word) for word in words_of_text(query)]
        terms = [term for own, plain in words if not plain for term in own]
        if not terms and all(plain for _, plain in words):
            terms = [term for own, _ in words for term in own]
        if not terms:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        limit = _ALL_ROWS if allowed is None else allowed
        rows, scores = self._best_rows(
            np.array(terms, np.int64), self._starts, self._rows, self._scores, limit, self.size, count
        )
        return rows, scores

    @cached_property
    def _best_rows(self) -> Any:
        from bessemer.retrieval.postings import best_rows

        return best_rows

    def _look_up(self, word: str) -> tuple[tuple[int, ...], bool]:
        """The places of a word's terms, without those that no row has, and whether it is a stop word."""
        hashes = np.array([hash_of_term(term) for term in terms_of(word)], np.uint64)
        places = np.searchsorted(self._terms, hashes)
        inside = places < len(self._terms)
        found = places[inside][self._terms[places[inside]] == hashes[inside]]
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[word] = known = tuple(found.tolist()), is_plain(word)
        return known


def hash_of_term(term: str) -> int:
    """64 bits."""
    return int.from_bytes(blake2b(term.encode(errors="replace"), digest_size=8).digest(), "little")


def build_word_index(batches: Iterable[list[str]], folder: Path) -> int:
    """Index texts, whose rows are counted from 0; their number. An index that is there is replaced.

    Memory: of the terms, about 200 bytes each, 8 bytes for each text, and 128 MB. Raises StorageError where the disk is full.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    entries = folder / "entries.tmp"
    with writing_to(folder):
        with entries.open("wb") as stream:
            counted = _Counted(batches, stream)
        counted.write(entries, folder)
        entries.unlink()
    return len(counted.lengths)


def bm25_scores(query: str, texts: Sequence[str]) -> np.ndarray:
    """(N,): the scores of texts that no index holds, as one of these texts alone gives them; 0 without a word of the query."""
    counts = [Counter(term for word in words_of_text(text) for term in terms_of(word)) for text in texts]
    lengths = np.array([sum(own.values()) for own in counts], np.float64)
    penalties = K1 * (1 - B + B * lengths / (lengths.mean() or 1.0)) if len(texts) else lengths
    words = words_of_text(query)
    scores = np.zeros(len(texts))
    for word in [word for word in words if not is_plain(word)] or words:
        for term in terms_of(word):
            frequencies = np.array([own[term] for own in counts], np.float64)
            documents = np.count_nonzero(frequencies)
            weight = np.log1p((len(texts) - documents + 0.5) / (documents + 0.5))
            scores += weight * frequencies * (K1 + 1) / (frequencies + penalties)
    return scores


class _Counted:
    """The terms of texts, counted; which text has which, and how often, is in a file of entries."""

    def __init__(self, batches: Iterable[list[str]], stream: BinaryIO) -> None:
        self._terms: dict[int, int] = {}
        self._known: dict[str, tuple[int, ...]] = {}
        self.lengths = np.empty(0, np.int64)
        self._documents = np.zeros(0, np.int64)
        lengths: list[np.ndarray] = []
        for batch in batches:
            lengths.append(self._count(batch, sum(len(one) for one in lengths), stream))
        self.lengths = np.concatenate(lengths) if lengths else self.lengths

    def _count(self, texts: list[str], first: int, stream: BinaryIO) -> np.ndarray:
        """Write the entries of texts, and return their lengths in terms. first: row of the first of them."""
        known, look_up = self._known, self._look_up
        own: list[list[int]] = []
        for text in texts:
            terms: list[int] = []
            for word in words_of_text(text, names_apart=False):
                terms += known.get(word) or look_up(word)
            own.append(terms)
        lengths = np.fromiter(map(len, own), np.int64, len(own))
        terms_T = np.fromiter((term for terms in own for term in terms), np.int64, int(lengths.sum()))
        keys, frequencies = np.unique((np.repeat(np.arange(len(own)), lengths) << 32) | terms_T, return_counts=True)
        terms_E, rows_E = keys & 0xFFFFFFFF, (keys >> 32) + first
        self._documents = np.concatenate([self._documents, np.zeros(len(self._terms) - len(self._documents), np.int64)])
        self._documents += np.bincount(terms_E, minlength=len(self._documents))
        for array in (terms_E, rows_E, frequencies):
            np.save(stream, array.astype(np.int32))
        return lengths

    def _look_up(self, word: str) -> tuple[int, ...]:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        hashes = [hash_of_term(term) for one in (word, *parts_of_name(word)) for term in terms_of(one)]
        self._known[word] = found = tuple(self._terms.setdefault(one, len(self._terms)) for one in hashes)
        return found

    def write(self, entries: Path, folder: Path) -> None:
        """Write the files."""
        from bessemer.retrieval.postings import fill_postings

        size = len(self.lengths)
        hashes = np.fromiter(self._terms, np.uint64, len(self._terms))
        order = np.argsort(hashes)
        # from a term's number to its place among the sorted hashes
        places = np.empty(len(order), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        documents = self._documents[order]
        starts = np.concatenate([[0], np.cumsum(documents)])
        weights = np.log1p((size - documents + 0.5) / (documents + 0.5))
        mean = self.lengths.mean() if size else 1.0
        penalties = K1 * (1 - B + B * self.lengths / (mean or 1.0))
        with (folder / "rows.bin").open("wb") as rows_file, (folder / "scores.bin").open("wb") as scores_file:
            for first, last in _slabs(starts):
                begin, count = starts[first], int(starts[last] - starts[first])
                rows, scores, cursors = np.empty(count, np.int32), np.empty(count, np.float32), starts[:-1] - begin
                for terms, texts, frequencies in _read(entries):
                    fill_postings(
                        places[terms], texts, frequencies, weights, penalties, K1 + 1, first, last, cursors, rows, scores
                    )
                _write(rows_file, rows)
                _write(scores_file, scores)
        for name, array in (("terms", hashes[order]), ("starts", starts.astype(np.int64))):
            with (folder / f"{name}.bin").open("wb") as stream:
                _write(stream, array)
        postings = int(starts[-1])
        sizes = {"terms": len(order), "starts": len(starts), "rows": postings, "scores": postings}
        write_json(folder / _HEAD, {"format": _FORMAT, "terms_version": TERMS_VERSION, "size": size, **sizes})


def _slabs(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of terms, each with at most the postings that are written at once, or one term with more."""
    bounds = [0]
    while bounds[-1] < len(starts) - 1:
        reached = int(np.searchsorted(starts, starts[bounds[-1]] + _POSTINGS_AT_ONCE, "right")) - 1
        bounds.append(max(bounds[-1] + 1, reached))
    return pairwise(bounds)


def _read(entries: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    with entries.open("rb") as stream:
        end = entries.stat().st_size
        while stream.tell() < end:
            yield np.load(stream), np.load(stream), np.load(stream)


def _write(stream: BinaryIO, array: np.ndarray) -> None:
    stream.write(np.ascontiguousarray(array).data.cast("B") if len(array) else b"")
    stream.flush()
    os.fsync(stream.fileno())
