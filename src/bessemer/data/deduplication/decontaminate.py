"""Decontamination by runs of 13 words shared with evaluation sets (Brown et al. 2020), and n-gram overlap of texts.

Words are compared in lower case and without accents and punctuation; digits count. An item shorter than a run, but of at least
`least_words` words, counts when it is contained whole. The strings of an item are searched one by one.

In scripts without spaces each character takes a part of a run: an ideograph a half, a kana or a letter of Thai, Lao, Khmer or
Burmese a quarter. So a run of 13 words is 26 Chinese characters or 52 Thai letters.

N-gram overlap is the share of each given text's n-grams that occur in any document; its memory is that of the texts' n-grams.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import SourceError
from bessemer.data.deduplication.removals import cut
from bessemer.data.deduplication.words import (
    ALONE,
    BASE,
    LIMIT,
    fold_table,
    hash_words,
    mixed,
    most_words,
    run_hash,
    run_hashes,
)
from bessemer.data.text.characters import code_point
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.texts import Texts

#: Sizes within a run: of a word, an ideograph, and a letter of a script without spaces.
_WORD, _IDEOGRAPH, _LETTER = 4, 2, 1
_FIRST_IDEOGRAPH, _FIRST_HALF_WIDTH = 0x3400, 0xFF66
#: The first byte of a character beyond U+07FF.
_THREE_BYTES = 0xE0


@compiled
def run_sizes(data: np.ndarray, fold: np.ndarray, places: np.ndarray, count: int, sizes: np.ndarray) -> None:
    """The size of each of `count` words within a run, to `sizes`."""
    for word in range(count):
        size, first = _WORD, places[word, 0]
        if data[first] >= _THREE_BYTES:
            code, _ = code_point(data, first)
            if code >= LIMIT or fold[code] & ALONE:
                size = _IDEOGRAPH if code >= _FIRST_IDEOGRAPH and not _FIRST_HALF_WIDTH <= code < LIMIT else _LETTER
        sizes[word] = size


@compiled
def sized_runs(
    hashes: np.ndarray, sizes: np.ndarray, count: int, ngram: int, powers: np.ndarray, ends: np.ndarray, runs: np.ndarray
) -> int:
    """For the run that begins with each word: one past its last word, to `ends`, and its hash by `run_hash`, to `runs`.

    A run is the fewest words that are as large as `ngram` words. Returns how many runs there are. powers: of `BASE`.
    """
    value, size, end = np.uint64(0), 0, 0
    for first in range(count):
        while size < ngram * _WORD and end < count:
            value = value * BASE + hashes[end]
            size += sizes[end]
            end += 1
        if size < ngram * _WORD:
            return first
        length = end - first
        runs[first] = mixed(np.uint64(length) * powers[length] + value)
        ends[first] = end
        value -= hashes[first] * powers[length - 1]
        size -= sizes[first]
    return count


@compiled_allocating
def powers_of_base(ngram: int) -> np.ndarray:
    """Powers of `BASE`, uint64, up to the most words that a run can have."""
    powers = np.ones(ngram * _WORD + 1, dtype=np.uint64)
    for exponent in range(1, len(powers)):
        powers[exponent] = powers[exponent - 1] * BASE
    return powers


class _Scratch(NamedTuple):
    """Arrays for one text at a time: hashes and places of its words, what each takes of a run; hashes and ends of runs."""

    words: np.ndarray
    places: np.ndarray
    sizes: np.ndarray
    runs: np.ndarray
    ends: np.ndarray
    powers: np.ndarray


@compiled_allocating
def _scratch(most: int, ngram: int) -> _Scratch:
    """Working memory of one call, for texts of at most `most` words."""
    words, runs = np.empty(most, dtype=np.uint64), np.empty(most, dtype=np.uint64)
    places, sizes = np.empty((most, 2), dtype=np.int64), np.empty(most, dtype=np.int64)
    return _Scratch(words, places, sizes, runs, np.empty(most, dtype=np.int64), powers_of_base(ngram))


@compiled
def _read_words(data: np.ndarray, begin: int, end: int, fold: np.ndarray, scratch: _Scratch) -> int:
    """Hashes and sizes of a text's words, to `scratch`; returns their number."""
    count, _ = hash_words(data, begin, end, fold, scratch.words, scratch.places, 0)
    run_sizes(data, fold, scratch.places, count, scratch.sizes)
    return count


@compiled
def _runs_of(count: int, ngram: int, length: int, scratch: _Scratch) -> int:
    """The runs of a text's words, to `scratch`: as large as `ngram` words where length is 0, else of `length` words.

    Returns how many there are; run r begins with word r and ends before word `scratch.ends[r]`.
    """
    if not length:
        return sized_runs(scratch.words, scratch.sizes, count, ngram, scratch.powers, scratch.ends, scratch.runs)
    total = run_hashes(scratch.words, count, length, scratch.runs)
    for run in range(total):
        scratch.ends[run] = run + length
    return total


@compiled_allocating
def index_runs(
    data: np.ndarray, offsets: np.ndarray, fold: np.ndarray, ngram: int, least_words: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, items and lengths, (R,) each, of all runs, whose length is given as 0, and of whole items that are shorter."""
    size = 0
    for text in range(len(offsets) - 1):
        size += most_words(offsets[text + 1] - offsets[text])
    hashes = np.empty(size, dtype=np.uint64)
    owners = np.empty(size, dtype=np.int64)
    lengths = np.empty(size, dtype=np.int64)
    scratch = _scratch(most_words(longest_text(offsets)), ngram)
    filled = 0
    for text in range(len(offsets) - 1):
        count = _read_words(data, offsets[text], offsets[text + 1], fold, scratch)
        total = _runs_of(count, ngram, 0, scratch)
        hashes[filled : filled + total] = scratch.runs[:total]
        lengths[filled : filled + total] = 0
        if total == 0 and scratch.sizes[:count].sum() >= least_words * _WORD:
            hashes[filled], lengths[filled], total = run_hash(scratch.words, 0, count), count, 1
        owners[filled : filled + total] = text
        filled += total
    return hashes[:filled], owners[:filled], lengths[:filled]


@compiled_allocating
def hash_table(runs: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Open addressing at a load of at most a half: hashes (T,) uint64 and owners (T,) int64. Of equal runs the first counts."""
    bits = 4
    while (1 << bits) < 2 * len(runs):
        bits += 1
    table = np.zeros(1 << bits, dtype=np.uint64)
    owners = np.full(1 << bits, -1, dtype=np.int64)
    for index in range(len(runs)):
        place = place_of_run(table, owners, runs[index])
        if owners[place] < 0:
            table[place], owners[place] = runs[index], items[index]
    return table, owners


@compiled
def place_of_run(table: np.ndarray, owners: np.ndarray, run: np.uint64) -> np.int64:
    """The slot of a run's hash in the table, or the free slot where it belongs."""
    place = np.int64(run & np.uint64(len(table) - 1))
    while owners[place] >= 0 and table[place] != run:
        place = (place + 1) & (len(table) - 1)
    return place


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
        """Mark the n-grams of a batch of documents."""
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
        """Different n-grams of each group, and those of them that a document had: (G,) int64 each."""
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
    scratch = _scratch(most_words(longest_text(offsets)), ngram)
    for text in range(len(offsets) - 1):
        count = _read_words(data, offsets[text], offsets[text + 1], fold, scratch)
        for kind in range(-1, len(lengths)):
            for run in range(_runs_of(count, ngram, lengths[kind] if kind >= 0 else 0, scratch)):
                entry = entries[place_of_run(table, entries, scratch.runs[run])]
                if entry >= 0:
                    seen[entry] = True


@dataclass(frozen=True)
class Item:
    """A text of an evaluation set: the set's name, the item's own name or number there, and one of its strings."""

    set: str
    item: str
    text: str


#: Labels of evaluation prompts, which stand before a text there and on no page.
_LABEL = re.compile(r"^\s*(question|q|answer|a|context|passage)\s*:\s*|\s*\b(answer|a)\s*:\s*$", re.IGNORECASE)


def read_items(path: Path, name: str | None = None) -> Iterator[Item]:
    """All strings of each record of a JSONL file, at any depth, as items named by the record's `id`, or its line from 1.

    The set is called after the file unless `name` is given. Raises SourceError with the line that is no JSON.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = json.loads(line)
                    item = str(record.get("id", number)) if isinstance(record, dict) else str(number)
                    for text in _strings(record):
                        yield Item(name or path.stem, item, _LABEL.sub("", text))
    except (ValueError, OSError) as error:
        place = f"{path}, line {number}" if isinstance(error, ValueError) else str(path)
        raise SourceError(f"{place}: this is not a set of evaluation items in JSONL ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "id":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True)
class Contamination:
    """An index of evaluation items, made once and applied to any batch.

    table (T,) uint64 and owners (T,) int64: by open addressing, the hash of each run and the first item that has it, -1 where
    there is none; lengths (L,) int64: of how many words there are items too short for a run; ngram: the words in a run; labels:
    `SET, item ITEM` of each item.
    """

    table: np.ndarray
    owners: np.ndarray
    lengths: np.ndarray
    ngram: int
    labels: list[str]
    #: Cut the runs out instead of dropping the document, unless fewer than `least_words_left` words are left.
    masks: bool
    least_words_left: int
    reads_texts: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        items: Iterable[Item],
        *,
        ngram: int = 13,
        least_words: int = 8,
        mask: bool = False,
        least_words_left: int = 10,
    ) -> Contamination:
        """Index the items. Where several have a run, the first by set and item names it, whatever order they come in.

        Raises ValueError for a `least_words` below 1 or above `ngram`.
        """
        if not 1 <= least_words <= ngram:
            raise ValueError(f"least_words is from 1 to ngram, {ngram}, not {least_words}")
        ordered = sorted(items, key=lambda item: (item.set, _natural(item.item), item.text))
        texts = Texts.of([item.text for item in ordered])
        hashes, owners, lengths = index_runs(texts.data, texts.offsets, fold_table("words"), ngram, least_words)
        labels = [f"{item.set}, item {item.item}" for item in ordered]
        table, owners = hash_table(hashes, owners)
        return cls(table, owners, np.unique(lengths[lengths > 0]), ngram, labels, mask, least_words_left)

    def find(self, texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is contained in each text: the item, (N,) int64, whose run comes first, or -1; and all spans, united.

        Spans are bounds (P, 2) int64 in bytes of the text, with offsets (N + 1,), as `cut` takes them.
        """
        capacity = max(1024, len(texts) * 4)
        while True:
            items = np.empty(len(texts), dtype=np.int64)
            bounds = np.empty((capacity, 2), dtype=np.int64)
            offsets = np.zeros(len(texts) + 1, dtype=np.int64)
            _find(
                texts.data,
                texts.offsets,
                fold_table("words"),
                self.lengths,
                self.ngram,
                self.table,
                self.owners,
                items,
                bounds,
                offsets,
            )
            if offsets[-1] <= capacity:
                return items, bounds[: offsets[-1]], offsets
            capacity = int(offsets[-1])

    def apply(self, ids: pa.Array, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
        """The texts and reasons `overlap with SET, item ITEM`; with `masks`, texts without the runs, dropped if too short."""
        items, bounds, offsets = self.find(Texts.from_arrow(texts))
        said = [f"overlap with {self.labels[item]}" if item >= 0 else None for item in items.tolist()]
        if not self.masks:
            return texts, pa.array(said, pa.string())
        remaining, words = cut(Texts.from_arrow(texts), bounds, offsets)
        short = (items >= 0) & (words < self.least_words_left)
        reason = pa.array([text if drop else None for text, drop in zip(said, short.tolist(), strict=True)], pa.string())
        # a dropped document keeps its text, for the report
        return pc.if_else(pc.is_null(reason), remaining, texts), reason


def _natural(name: str) -> tuple[int, int | str]:
    """Numbers in their order, before names."""
    return (0, int(name)) if name.isdecimal() else (1, name)


@compiled_allocating
def _find(
    data: np.ndarray,
    offsets: np.ndarray,
    fold: np.ndarray,
    lengths: np.ndarray,
    ngram: int,
    table: np.ndarray,
    owners: np.ndarray,
    items: np.ndarray,
    bounds: np.ndarray,
    ends: np.ndarray,
) -> None:
    scratch = _scratch(most_words(longest_text(offsets)), ngram)
    places = scratch.places
    # by first word: where the longest contained run ends, 0 for none
    until = np.empty(len(places), dtype=np.int64)
    spans = 0
    for text in range(len(offsets) - 1):
        base = offsets[text]
        items[text] = -1
        count = _read_words(data, base, offsets[text + 1], fold, scratch)
        until[:count] = 0
        earliest = count
        for kind in range(-1, len(lengths)):
            for run in range(_runs_of(count, ngram, lengths[kind] if kind >= 0 else 0, scratch)):
                item = owners[place_of_run(table, owners, scratch.runs[run])]
                if item >= 0:
                    until[run] = max(until[run], scratch.ends[run])
                    if run < earliest or (run == earliest and item < items[text]):
                        earliest = run
                        items[text] = item
        word = earliest
        while word < count:
            if until[word] == 0:
                word += 1
                continue
            end = until[word]
            index = word + 1
            while index <= end and index < count:
                end = max(end, until[index])
                index += 1
            if spans < len(bounds):
                bounds[spans, 0], bounds[spans, 1] = places[word, 0] - base, places[end - 1, 1] - base
            spans += 1
            word = index
        ends[text + 1] = spans
