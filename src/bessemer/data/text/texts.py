"""Batch of texts for filters: the UTF-8 bytes of all, their offsets, words, lines and sentences; hashes; spans replaced.

Words and lines are computed once and shared by all filters; sentences are gathered from words. The hash of a text is the
column `text_hash`. Edits name spans of a batch and get the texts with them replaced.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.hashing import hash_bytes
from bessemer.data.text.characters import SPACE, character_classes, code_point
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.lines import Lines, Spans, characters_of, find_lines, find_paragraphs
from bessemer.data.text.words import BEGINS_LINE, ENDS_SENTENCE, IS_PUNCTUATION, Words, find_words


def find_sentences(data: np.ndarray, words: Words) -> Spans:
    """The sentences of each text.

    One ends at the line's end, or with a mark such as `.`, `!` or `?` that is a word of its own (the full stop of `e.g.`
    is not), and with the punctuation behind it.
    """
    most = len(words)
    starts, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    characters, of_text = np.empty(most, np.int32), np.zeros(len(words.of_text), np.int64)
    count = _gather(data, words.starts, words.ends, words.traits, words.of_text, starts, ends, characters, of_text)
    return Spans(starts[:count], ends[:count], of_text, characters[:count])


@compiled
def _gather(
    data: np.ndarray,
    word_starts: np.ndarray,
    word_ends: np.ndarray,
    traits: np.ndarray,
    words_of_text: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    characters: np.ndarray,
    of_text: np.ndarray,
) -> int:
    count = 0
    for text in range(len(words_of_text) - 1):
        is_over = False
        for word in range(words_of_text[text], words_of_text[text + 1]):
            kind = traits[word]
            begins = kind & BEGINS_LINE or (is_over and not kind & (IS_PUNCTUATION | ENDS_SENTENCE))
            if begins:
                is_over = False
                starts[count] = word_starts[word]
                count += 1
            if kind & ENDS_SENTENCE:
                is_over = True
            ends[count - 1] = word_ends[word]
        of_text[text + 1] = count
    for sentence in range(count):
        characters[sentence] = characters_of(data, starts[sentence], ends[sentence])
    return count


@dataclass(frozen=True)
class Texts:
    """N texts, one behind the other.

    `data` holds the UTF-8 bytes of all, (bytes,) uint8; text n is `data[offsets[n]:offsets[n + 1]]`, offsets (N + 1,) int64.
    Words, lines and the rest are found when first asked for, and kept: every filter reads the same.
    """

    array: pa.Array
    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_arrow(cls, array: pa.Array) -> Texts:
        """From an Arrow array of strings without nulls; the bytes are not copied."""
        assert pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        assert not array.null_count
        _, offset_buffer, data_buffer = array.buffers()
        wide = pa.types.is_large_string(array.type)
        if offset_buffer is None or not len(array):
            offsets = np.zeros(len(array) + 1, dtype=np.int64)
        else:
            stored = np.frombuffer(offset_buffer, dtype=np.int64 if wide else np.int32)
            offsets = stored[array.offset : array.offset + len(array) + 1].astype(np.int64)
        data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
        # most of Arrow's buffers are read-only; for writable ones all loops would be compiled again
        data.flags.writeable = False
        return cls(array, data, offsets)

    @classmethod
    def of(cls, texts: list[str]) -> Texts:
        """From Python strings. Raises UnicodeEncodeError for a lone surrogate, TypeError for a single string."""
        if isinstance(texts, str):
            raise TypeError("a list of texts is needed, got str: [text] is the list of one")
        return cls.from_arrow(pa.array(texts, pa.string()))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def characters(self) -> np.ndarray:
        """Characters of each text, (N,) int64."""
        return pc.utf8_length(self.array).to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def words(self) -> Words:
        """Words and punctuation marks, as `text.words` cuts them."""
        return find_words(self.data, self.offsets)

    @cached_property
    def lines(self) -> Lines:
        r"""Lines as `str.split("\n")` cuts them: an empty text has one empty line."""
        return find_lines(self.data, self.offsets, unicode=False)

    @cached_property
    def unicode_lines(self) -> Lines:
        r"""Lines as `str.splitlines` cuts them: at every line break of Unicode; `\r\n` is one."""
        return find_lines(self.data, self.offsets, unicode=True)

    @cached_property
    def paragraphs(self) -> Lines:
        """Paragraphs: text between empty lines."""
        return find_paragraphs(self.data, self.offsets)

    @cached_property
    def sentences(self) -> Spans:
        """Sentences, none longer than its line."""
        return find_sentences(self.data, self.words)


_BLANK, _DELETE = 0x20, 0x7F


def hash_text(text: str) -> str:
    """128-bit hash, hexadecimal, of the text in NFC with runs of white space as one space and none at the ends."""
    return hash_bytes(" ".join(unicodedata.normalize("NFC", text).split()).encode())


def hash_texts(array: pa.Array) -> list[str]:
    """`hash_text` of each of N strings. Only those that Unicode's composition would change go through Python's own strings."""
    texts = Texts.from_arrow(array)
    written = np.empty(int(texts.offsets[-1] - texts.offsets[0]), np.uint8)
    ends, is_ascii = np.zeros(len(texts) + 1, np.int64), np.zeros(len(texts), np.bool_)
    _single_spaced(texts.data, texts.offsets, character_classes(), written, ends, is_ascii)
    hashes, content = [], written.data
    for number, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if not is_ascii[number]:
            text = array[number].as_py()
            if not unicodedata.is_normalized("NFC", text):
                hashes.append(hash_text(text))
                continue
        hashes.append(hash_bytes(content[start:end]))
    return hashes


def rehashed(before: pa.Array, after: pa.Array, hashes: pa.Array) -> pa.Array:
    """The column `text_hash` of edited texts: `hashes` stay where the text does, without the heading that some texts have."""
    is_new = pc.not_equal(before, after)
    return pc.replace_with_mask(hashes, is_new, pa.array(hash_texts(after.filter(is_new)), pa.string()))


@compiled
def _single_spaced(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, written: np.ndarray, ends: np.ndarray, is_ascii: np.ndarray
) -> None:
    """Write each text with runs of white space as one space and none at its ends, and where it ends."""
    index = 0
    for text in range(len(offsets) - 1):
        at, end, begin = offsets[text], offsets[text + 1], index
        seen, waits = 0, False
        while at < end:
            code, length = code_point(data, at)
            seen |= code
            if classes[code] & SPACE:
                waits = index > begin
                at += length
                continue
            if waits:
                written[index] = _BLANK
                index, waits = index + 1, False
            # a word's bytes as they are
            while True:
                written[index] = data[at]
                index, at = index + 1, at + 1
                if at == end or not (_BLANK < data[at] < _DELETE or data[at] & 0xC0 == 0x80):
                    break
        is_ascii[text] = seen < 0x80
        ends[text + 1] = index


#: Most passes: only texts made for it need more, and would cost their length squared.
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
