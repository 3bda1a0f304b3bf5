"""A batch of texts as the filters see it: the UTF-8 bytes of all, where each begins, and what was found out about them once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Texts:
    """N texts, one behind the other.

    `data` holds the UTF-8 bytes of all, (bytes,) uint8; text n is `data[offsets[n]:offsets[n + 1]]`, offsets (N + 1,) int64.
    Whatever several filters need (words, lines) is a cached property, so that it is made at most once.
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
        return cls(array, data, offsets)

    @classmethod
    def of(cls, texts: list[str]) -> Texts:
        """Of Python strings. Raises UnicodeEncodeError for a lone surrogate."""
        return cls.from_arrow(pa.array(texts, pa.string()))

    def __len__(self) -> int:
        return len(self.offsets) - 1
