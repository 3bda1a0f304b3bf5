"""Decontamination: documents that share a run of 13 words with an item of an evaluation set (Brown et al. 2020).

Words are compared in lower case and without accents and punctuation; digits count. An item of fewer words than a run, but at
least `least_words`, counts when it is contained whole. The strings of an item are looked for one by one: what stands between a
question and its answer on a page nobody knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import SourceError
from bessemer.data.deduplication.folding import fold_table
from bessemer.data.deduplication.removals import cut
from bessemer.data.deduplication.word_runs import hash_table, index_runs, place_of_run, powers_of_base, run_sizes, sized_runs
from bessemer.data.deduplication.words import hash_words, most_words, run_hashes
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts


@dataclass(frozen=True)
class Item:
    """A text of an evaluation set: the set's name, the item's own name or number there, and one of its strings."""

    set: str
    item: str
    text: str


#: What evaluation prompts put before a text and no page does.
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
        # what is dropped is shown as it was
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
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    words = np.empty(most_words(longest), dtype=np.uint64)
    places = np.empty((len(words), 2), dtype=np.int64)
    # a run that begins at this word is contained up to that one
    until = np.empty(len(words), dtype=np.int64)
    runs = np.empty(len(words), dtype=np.uint64)
    sizes = np.empty(len(words), dtype=np.int64)
    run_ends = np.empty(len(words), dtype=np.int64)
    powers = powers_of_base(ngram)
    found = 0
    for text in range(len(offsets) - 1):
        base = offsets[text]
        items[text] = -1
        count, _ = hash_words(data, base, offsets[text + 1], fold, words, places, 0)
        until[:count] = 0
        earliest = count
        run_sizes(data, fold, places, count, sizes)
        for kind in range(-1, len(lengths)):
            if kind < 0:
                total = sized_runs(words, sizes, count, ngram, powers, run_ends, runs)
            else:
                total = run_hashes(words, count, lengths[kind], runs)
            for run in range(total):
                item = owners[place_of_run(table, owners, runs[run])]
                if item >= 0:
                    until[run] = max(until[run], run_ends[run] if kind < 0 else run + lengths[kind])
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
            if found < len(bounds):
                bounds[found, 0], bounds[found, 1] = places[word, 0] - base, places[end - 1, 1] - base
            found += 1
            word = index
        ends[text + 1] = found
