"""Spans of a batch of texts, and the texts with them replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts

#: More are needed only by texts made for it, whose passes would cost their length squared.
_PASSES = 8


class Span(NamedTuple):
    """Bytes `start` to `end` of a batch's `data`, found to be of a kind."""

    start: int
    end: int
    kind: str


def without_overlaps(spans: Iterable[Span]) -> list[Span]:
    """The spans in order; of those that overlap the one that begins first stays, of several the longest."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def masked(
    texts: Texts, find: Callable[[Texts], Iterable[Span]], masks: Mapping[str, str], columns: Mapping[str, str]
) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts with all that `find` finds replaced by its kind's mask, and how much of each kind each text had, by column.

    A mask ends what stood beside it, which may only then be found (`DE89…00+49 30 …`): so what was changed is looked
    through again, up to `_PASSES` times, and masking a masked text changes nothing.
    """
    array, counts = texts.array, {column: np.zeros(len(texts), np.int64) for column in columns.values()}
    rows, batch = np.arange(len(texts)), texts
    for _ in range(_PASSES):
        spans = without_overlaps(find(batch))
        if not spans:
            break
        changed = np.zeros(len(batch), bool)
        owners = np.searchsorted(batch.offsets, [span.start for span in spans], side="right") - 1
        changed[owners] = True
        for owner, span in zip(owners, spans, strict=True):
            counts[columns[span.kind]][rows[owner]] += 1
        edited = replaced(batch, spans, masks).filter(pa.array(changed))
        rows = rows[changed]
        if len(rows) == len(array):
            array = edited
        else:
            touched = np.zeros(len(array), bool)
            touched[rows] = True
            array = pc.replace_with_mask(array, pa.array(touched), edited)
        batch = Texts.from_arrow(edited)
    return array, {column: pa.array(found) for column, found in counts.items()}


def replaced(texts: Texts, spans: list[Span], replacements: Mapping[str, str]) -> pa.Array:
    """The texts with each span's bytes replaced by its kind's text; the very array where there are no spans.

    `spans` are in order, do not overlap, and cut no character.
    """
    if not spans:
        return texts.array
    kinds = list(replacements)
    inserts = [replacements[kind].encode() for kind in kinds]
    insert_offsets = np.concatenate([[0], np.cumsum([len(insert) for insert in inserts])]).astype(np.int64)
    number = {kind: index for index, kind in enumerate(kinds)}
    data, offsets = _spliced(
        texts.data,
        texts.offsets,
        np.array([span.start for span in spans], np.int64),
        np.array([span.end for span in spans], np.int64),
        np.array([number[span.kind] for span in spans], np.int64),
        np.frombuffer(b"".join(inserts), np.uint8),
        insert_offsets,
    )
    return strings(data, offsets)


def strings(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """An Arrow array of strings over UTF-8 bytes and where each string begins in them. Copies no text."""
    if len(data) > np.iinfo(np.int32).max:
        return pa.LargeStringArray.from_buffers(
            len(offsets) - 1, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)
        ).cast(pa.string())
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data))


@compiled_allocating
def _spliced(
    data: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    kinds: np.ndarray,
    inserts: np.ndarray,
    insert_offsets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    grown = 0
    for span in range(len(starts)):
        grown += insert_offsets[kinds[span] + 1] - insert_offsets[kinds[span]] - (ends[span] - starts[span])
    out = np.empty(offsets[-1] - offsets[0] + grown, np.uint8)
    out_offsets = np.zeros_like(offsets)
    at = 0
    span = 0
    for text in range(len(offsets) - 1):
        copied = offsets[text]
        while span < len(starts) and starts[span] < offsets[text + 1]:
            length = starts[span] - copied
            out[at : at + length] = data[copied : starts[span]]
            at += length
            first, last = insert_offsets[kinds[span]], insert_offsets[kinds[span] + 1]
            out[at : at + last - first] = inserts[first:last]
            at += last - first
            copied = ends[span]
            span += 1
        length = offsets[text + 1] - copied
        out[at : at + length] = data[copied : offsets[text + 1]]
        at += length
        out_offsets[text + 1] = at
    return out, out_offsets
