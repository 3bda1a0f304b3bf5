"""Near duplicates: MinHash bands find candidates, exact Jaccard similarity confirms them, union-find gathers them.

Only keys leave the texts: 8 bytes for each band and document lie on disk and are sorted band by band. Texts are read once for
the keys and once more for the shingles of candidates.

All pairs within a band's group would be quadratic in its size. Instead the group's smallest id is compared with all others;
those similar to it join it, the rest go on with the smallest among them, for at most `_LEADERS` rounds. A group of copies
costs one comparison per member; pairs that are already connected cost none. A component is named after its smallest member.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bessemer.data.deduplication.corpus import Corpus, Parts, first_of_groups, group_numbers, groups_of_equal
from bessemer.data.deduplication.minhash import Orders, band_keys, jaccard, sets_between, shingle_sets
from bessemer.data.deduplication.removals import DuplicateRemovals
from bessemer.data.text.compiled import compiled, compiled_allocating


class Components:
    """Over the numbers 0 to N - 1, each alone at first. 4 bytes a number up to 2^31, 8 above."""

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)

    def unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the components of each pair, (P,) integers each."""
        _unite(self._parents, left, right)

    def smallest(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest member of each number's component."""
        return _roots(self._parents, numbers)

    def others(self) -> np.ndarray:
        """All numbers that are not the smallest of their component, sorted."""
        return np.flatnonzero(self._parents != np.arange(len(self._parents)))


@compiled
def _root(parents: np.ndarray, number: int) -> int:
    while parents[number] != number:
        # halves the path for the next search
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


@compiled
def _unite(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    for index in range(len(left)):
        one, other = _root(parents, left[index]), _root(parents, right[index])
        if one < other:
            parents[other] = one
        else:
            parents[one] = other


@compiled_allocating
def _roots(parents: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    roots = np.empty(len(numbers), dtype=np.int64)
    for index in range(len(numbers)):
        roots[index] = _root(parents, numbers[index])
    return roots


_LEADERS = 4
#: Of a crowd, documents are compared that share a shingle which at most this many have.
_RARE = 4
#: Shingles read before the mapped file of sets is released: 4 MB, and up to 25 times that with what the system
#: loads around them.
_SHINGLES_MAPPED = 1 << 19
# shingles of a crowd that are sorted at a time
_SHINGLES_SORTED = 1 << 22


@dataclass(frozen=True)
class NearDuplicates:
    """The removals, and how many pairs were compared for them."""

    duplicates: DuplicateRemovals
    #: Documents that share a band's key with another.
    candidates: int
    #: Pairs whose exact similarity was computed, and how many of these reached the threshold.
    compared: int
    confirmed: int


def near_duplicates(
    corpus: Corpus,
    scratch: Path,
    *,
    ngram: int = 5,
    bands: int = 14,
    rows: int = 8,
    threshold: float = 0.8,
    verify: bool = True,
) -> NearDuplicates:
    """Documents of each connected component of similar ones, but for the one with the smallest id.

    ngram: words in a shingle. threshold: the least Jaccard similarity that connects two candidates. With `verify` off all
    candidates are connected, as in pipelines that keep signatures only. Reasons are `near duplicate of ID (0.87)`, the
    similarity to the survivor; it can be under the threshold where others lie between, and is left out with `verify` off.
    scratch: a folder for files of 8 * bands bytes a document and, for candidates, 8 bytes a shingle.
    """
    components = Components(len(corpus))
    with Parts(scratch / "bands", "<u8", bands) as keys, Parts(scratch / "shingles", "<u8", 1) as shingles:
        numbers = _spill_keys(corpus, keys, Orders.of(bands, rows), ngram)
        is_candidate = np.zeros(len(corpus), dtype=bool)
        for members, hubs in _groups(keys, numbers):
            is_candidate[members] = True
            if not verify:
                components.unite(hubs, members)
        if not verify:
            dropped = components.others()
            duplicates = DuplicateRemovals.of("near duplicate", corpus, dropped, components.smallest(dropped))
            return NearDuplicates(duplicates, int(is_candidate.sum()), 0, 0)
        comparison = _Comparison(corpus, is_candidate, shingles, ngram)
        matcher = _Matcher(keys, numbers, comparison, components, threshold)
        matcher.unite_similar()
        dropped = components.others()
        survivors = components.smallest(dropped)
        duplicates = DuplicateRemovals.of(
            "near duplicate", corpus, dropped, survivors, comparison.similarities(dropped, survivors)
        )
        return NearDuplicates(duplicates, int(is_candidate.sum()), matcher.compared, matcher.confirmed)


def _spill_keys(corpus: Corpus, keys: Parts, orders: Orders, ngram: int) -> np.ndarray:
    """Put every document's keys on disk, a part per band; returns the numbers of the documents in the order of their keys."""
    numbers = [np.zeros(0, dtype=np.int64)]
    for batch_numbers, texts in corpus.texts():
        batch_keys, has_words = band_keys(texts, orders, ngram)
        for band in range(orders.bands):
            keys.append(band, batch_keys[band, has_words])
        numbers.append(batch_numbers[has_words])
    return np.concatenate(numbers)


def _groups(keys: Parts, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each band the documents that share a key with another, and for each the smallest number of its group."""
    for band in range(keys.parts):
        rows, groups = groups_of_equal(keys[band], numbers)
        members = numbers[rows]
        yield members, members[first_of_groups(groups)]


class _Comparison:
    """Exact similarities of candidates, whose shingle sets lie on disk."""

    def __init__(self, corpus: Corpus, is_candidate: np.ndarray, shingles: Parts, ngram: int) -> None:
        self._shingles = shingles
        # by document number: its row in `_sizes` and `_starts`
        self._slots = np.cumsum(is_candidate) - 1
        self._sizes = np.zeros(int(is_candidate.sum()), dtype=np.int64)
        self._starts = np.zeros_like(self._sizes)
        written = 0
        for numbers, texts in corpus.texts():
            chosen = np.flatnonzero(is_candidate[numbers])
            sets, offsets = shingle_sets(texts, chosen, ngram)
            shingles.append(0, sets)
            slots = self._slots[numbers[chosen]]
            self._sizes[slots] = np.diff(offsets)
            self._starts[slots] = offsets[:-1] + written
            written += len(sets)

    def similarities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Jaccard similarity of each pair of documents, (P,) float32. Only so much of the sets is in memory at a time."""
        left, right = self._slots[left], self._slots[right]
        by_chunk = [
            jaccard(self._shingles.mapped(0), self._starts, self._sizes, left[pairs], right[pairs])
            for pairs in _in_chunks(self._sizes[left] + self._sizes[right])
        ]
        return np.concatenate(by_chunk)

    def shingles_of(self, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All shingles of some documents with the number of theirs, (S,) each, in parts by ranges of shingles."""
        slots = self._slots[documents]
        parts = int(self._sizes[slots].sum()) // _SHINGLES_SORTED + 1
        width = 2**64 // parts + 1
        for part in range(parts if len(slots) else 0):
            low, high = np.uint64(part * width), np.uint64(min((part + 1) * width, 2**64) - 1)
            by_chunk = [
                sets_between(self._shingles.mapped(0), self._starts, self._sizes, slots[chunk], low, high)
                for chunk in _in_chunks(self._sizes[slots])
            ]
            shingles, counts = (np.concatenate(column) for column in zip(*by_chunk, strict=True))
            yield shingles, np.repeat(documents, counts)


def _in_chunks(sizes: np.ndarray) -> list[np.ndarray]:
    """Indices of N things in chunks of about `_SHINGLES_MAPPED` of their sizes; at least one chunk."""
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(np.cumsum(sizes) // _SHINGLES_MAPPED)) + 1)


class _Matcher:
    """Compares candidates, unites similar ones, and counts both."""

    def __init__(
        self, keys: Parts, numbers: np.ndarray, comparison: _Comparison, components: Components, threshold: float
    ) -> None:
        self._keys = keys
        self._numbers = numbers
        self._comparison = comparison
        self._components = components
        self._threshold = np.float32(threshold)
        self.compared = self.confirmed = 0

    def unite_similar(self) -> None:
        """Unite similar documents: of those that share a band's key, then of the crowds, groups too large to compare whole."""
        crowds = np.zeros(len(self._numbers), dtype=bool)
        for band in range(self._keys.parts):
            crowds[self._compare_with_leaders(*groups_of_equal(self._keys[band], self._numbers))] = True
        crowd = np.sort(self._numbers[crowds])
        for shingles, numbers in self._comparison.shingles_of(crowd):
            rows, groups = groups_of_equal(shingles, numbers)
            rare = np.bincount(groups)[groups] <= _RARE if len(groups) else np.zeros(0, dtype=bool)
            members, groups = numbers[rows[rare]], groups[rare]
            pairs = [np.zeros((0, 2), dtype=np.int64)]
            for step in range(1, _RARE):
                together = groups[step:] == groups[:-step]
                pairs.append(np.stack([members[:-step][together], members[step:][together]], axis=1))
            self._unite_similar_pairs(*np.unique(np.concatenate(pairs), axis=0).T)

    def _compare_with_leaders(self, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """In up to `_LEADERS` rounds, compares each group's first member with the others. Returns the rows left over.

        rows (M,): where a document's keys are; groups (M,): sorted; within a group by the documents' numbers.
        """
        for _ in range(_LEADERS):
            if not len(rows):
                break
            hubs = first_of_groups(groups)
            others = np.flatnonzero(hubs != np.arange(len(rows)))
            united = self._unite_similar_pairs(self._numbers[rows[hubs[others]]], self._numbers[rows[others]])
            left = others[~united]
            left = left[_with_others(groups[left])]
            rows, groups = rows[left], group_numbers(groups[left])
        return rows

    def _unite_similar_pairs(self, hubs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Unites the pairs whose similarity reaches the threshold. Returns which are united now, (P,) bool."""
        united = self._components.smallest(hubs) == self._components.smallest(others)
        unknown = np.flatnonzero(~united)
        reached = self._comparison.similarities(hubs[unknown], others[unknown]) >= self._threshold
        self.compared += len(unknown)
        self.confirmed += int(reached.sum())
        united[unknown] = reached
        self._components.unite(hubs[unknown][reached], others[unknown][reached])
        return united


def _with_others(groups: np.ndarray) -> np.ndarray:
    """Whether each row shares its group with another, (M,) bool, given sorted group numbers, (M,)."""
    paired = np.zeros(len(groups), dtype=bool)
    equal = groups[1:] == groups[:-1]
    paired[1:] |= equal
    paired[:-1] |= equal
    return paired
