"""Batch of texts for filters: the UTF-8 bytes of all, where each begins, and its words and lines, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.text.lines import Lines, find_lines, find_paragraphs
from bessemer.data.text.sentences import find_sentences
from bessemer.data.text.spans import Spans
from bessemer.data.text.words import Words, find_words


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
        """Of an array of strings without nulls; the bytes are not copied."""
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
        # as most of Arrow's are; for the others all loops would be compiled again
        data.flags.writeable = False
        return cls(array, data, offsets)

    @classmethod
    def of(cls, texts: list[str]) -> Texts:
        """Of Python strings. Raises UnicodeEncodeError for a lone surrogate, TypeError for a text alone."""
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
        r"""What `str.split("\n")` gives: of an empty text one empty line."""
        return find_lines(self.data, self.offsets, unicode=False)

    @cached_property
    def unicode_lines(self) -> Lines:
        r"""What `str.splitlines` gives: cut at every line break that Unicode knows, `\r\n` being one."""
        return find_lines(self.data, self.offsets, unicode=True)

    @cached_property
    def paragraphs(self) -> Lines:
        """What stands between empty lines."""
        return find_paragraphs(self.data, self.offsets)

    @cached_property
    def sentences(self) -> Spans:
        """Sentences, none longer than its line."""
        return find_sentences(self.data, self.words)
