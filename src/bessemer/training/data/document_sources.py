"""The source of each token of a token stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.memmap import memmapped_arrays


class DocumentSources:
    """The sources of a stream's documents by position. Ten bytes a document."""

    def __init__(self, shards: TokenShards, scratch: Path | None = None) -> None:
        """Read the index of documents; with a folder `scratch`, once, memory-mapped from there on."""
        #: Names by source number.
        self.names = shards.sources
        dtypes = {"starts": np.int64, "sources": np.int16}
        arrays = memmapped_arrays(scratch, f"sources-{shards.fingerprint}", dtypes, _chunks(shards))
        self._starts = arrays["starts"]
        self._sources = arrays["sources"]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The sources' numbers, int16, of the documents that hold these positions of the stream; any shape."""
        return self._sources[np.searchsorted(self._starts, positions, side="right") - 1]

    def between(self, start: int, length: int) -> np.ndarray:
        """The sources' numbers of `length` tokens of the stream from `start` on: int16 (length,)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        end = int(np.searchsorted(self._starts, start + length))
        borders = np.concatenate([[start], self._starts[first + 1 : end], [start + length]])
        return np.repeat(self._sources[first:end], np.diff(borders))


def _chunks(shards: TokenShards) -> Iterator[dict[str, np.ndarray]]:
    start = 0
    for lengths, sources in shards.lengths_and_sources():
        ends = start + np.cumsum(lengths)
        yield {"starts": ends - lengths, "sources": sources}
        start = int(ends[-1])
