"""The pictures of a run's batches: prepared once, kept in a file, and read when a batch holds a token of them.

A token of a picture is known by the number of its vector: tile by tile, the tokens of a tile in order. So rows are cut, packed
and put together as those of text, and a batch encodes the tiles that it needs and no others. Of Qwen2.5-VL's pictures, which
keep their shapes, each is one tile of a size of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.hashing import hash_value
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.native import GridSpan, packed_rope_positions
from bessemer.model.vision.preprocessing import Prepared, Preprocessor
from bessemer.model.vision.trained import BatchPictures, needed_pictures


@dataclass(frozen=True, eq=False)
class PictureTable:
    """Prepared pictures, mapped from a file.

    tiles: (N, side, side, 3) uint8; of pictures in shapes of their own, their bytes one after the other. digests: of the
    pictures, in the order of their tiles. tokens_per_tile: 0 where pictures have shapes of their own. sizes: these, (N, 2):
    height and width in pixels.
    """

    tiles: NDArray[np.uint8] = field(repr=False)
    preprocessor: Preprocessor
    tokens_per_tile: int
    digests: tuple[bytes, ...] = field(repr=False)
    sizes: NDArray[np.int64] | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures and their order."""
        return hash_value([digest.hex() for digest in self.digests])

    @cached_property
    def grids(self) -> NDArray[np.int64]:
        """Rows and columns of tokens of each picture in its own shape, (N, 2)."""
        assert self.sizes is not None
        return self.sizes // (self.preprocessor.patch_size * self.preprocessor.merge_size)

    @cached_property
    def first_vectors(self) -> NDArray[np.int64]:
        """The number of the first vector of each tile or picture, and behind them the number of all, (N + 1)."""
        if self.sizes is None:
            return np.arange(len(self.tiles) + 1, dtype=np.int64) * self.tokens_per_tile
        return np.concatenate([[0], np.cumsum(self.grids.prod(1))])

    def pixels_of(self, number: int) -> NDArray[np.uint8]:
        """A picture in its own shape, (1, height, width, 3)."""
        assert self.sizes is not None
        height, width = self.sizes[number].tolist()
        first = int(self._first_bytes[number])
        return self.tiles[first : first + height * width * 3].reshape(1, height, width, 3)

    @cached_property
    def _first_bytes(self) -> NDArray[np.int64]:
        assert self.sizes is not None
        return np.concatenate([[0], np.cumsum(self.sizes.prod(1) * 3)])

    def of_batch(self, vector_of_token_BT: Tensor, rope_BT3: Tensor | None = None) -> BatchPictures:
        """The tiles of a batch's tokens, and their tokens' places among the vectors of these. The first tile, which then has no
        token, where a batch has none, so that the encoder's parameters have a gradient in every step."""
        device = vector_of_token_BT.device
        needed_M, inside_BT = needed_pictures(vector_of_token_BT.cpu(), torch.from_numpy(self.first_vectors))
        if self.sizes is None:
            pixels = self.preprocessor.pixels(Prepared(self.tiles[needed_M.numpy()], 0, 0, b""))
        else:
            shown = [self.preprocessor.pixels(Prepared(self.pixels_of(one), 0, 0, b"")) for one in needed_M.tolist()]
            pixels = Pixels.joined(shown)
        rope_3BT = None if rope_BT3 is None else rope_BT3.permute(2, 0, 1)
        return BatchPictures(pixels._replace(values=pixels.values.to(device)), inside_BT.to(device), rope_3BT)

    def rope_positions(
        self, vector_of_token_BT: Tensor, positions_BT: Tensor | None, document_ids_BT: Tensor | None
    ) -> Tensor | None:
        """Positions in time, rows and columns of the tokens of a batch with these pictures, (B, T, 3) int64; None where the
        model has none of the kind. Arguments as of `Batch`."""
        if self.sizes is None:
            return None
        vectors_BT = vector_of_token_BT.numpy()
        rows, columns = vectors_BT.shape
        known_BT = np.broadcast_to(np.arange(columns), (rows, columns)) if positions_BT is None else positions_BT.numpy()
        documents_BT = np.ones((rows, columns), np.int64) if document_ids_BT is None else document_ids_BT.numpy()
        turned = [
            packed_rope_positions(positions_T, documents_T, self._spans(vectors_T))
            for positions_T, documents_T, vectors_T in zip(known_BT, documents_BT, vectors_BT, strict=True)
        ]
        return torch.from_numpy(np.stack(turned)) if turned else torch.zeros(0, columns, 3, dtype=torch.int64)

    def _spans(self, vectors_T: NDArray[np.int64]) -> list[GridSpan]:
        """The pictures of a row."""
        # a picture that stands twice begins anew where its numbers do not go on
        before_T = np.concatenate([[-1], vectors_T[:-1]])
        (starts,) = np.nonzero((vectors_T >= 0) & ((before_T < 0) | (vectors_T != before_T + 1)))
        spans = []
        for start in starts.tolist():
            place = start
            while place < len(vectors_T) and vectors_T[place] >= 0 and vectors_T[place] - vectors_T[start] == place - start:
                number = int(np.searchsorted(self.first_vectors, vectors_T[place], side="right")) - 1
                spans.append(GridSpan(place - int(vectors_T[place] - self.first_vectors[number]), *self.grids[number].tolist()))
                place += int(self.first_vectors[number + 1] - vectors_T[place])
        return spans


class PictureFile:
    """Writes prepared pictures to a file, each once; `table` then maps it into memory. A context manager."""

    def __init__(self, path: Path, preprocessor: Preprocessor, tokens_per_tile: int) -> None:
        """tokens_per_tile: as of `PictureTable`."""
        self._path = path
        self._preprocessor = preprocessor
        self._tokens_per_tile = tokens_per_tile
        self._stream: BinaryIO | None = None
        #: The first tile of each picture, how many it has, and the number of its first vector.
        self._placed: dict[bytes, tuple[int, int, int]] = {}
        #: Sizes of pictures in shapes of their own; those of tiles are equal.
        self._sizes: list[tuple[int, int]] = []
        self._shape: tuple[int, ...] = ()
        self._tiles = self._vectors = 0
        self._table: PictureTable | None = None

    def add(self, prepared: Prepared) -> int:
        """The number of the first vector of a picture, which is written if it is new."""
        if prepared.digest not in self._placed:
            if self._stream is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._path.open("wb")
                self._shape = prepared.tiles.shape[1:]
            self._stream.write(np.ascontiguousarray(prepared.tiles).tobytes())
            self._placed[prepared.digest] = self._tiles, len(prepared.tiles), self._vectors
            self._tiles += len(prepared.tiles)
            if self._tokens_per_tile:
                assert prepared.tiles.shape[1:] == self._shape, (prepared.tiles.shape, self._shape)
                self._vectors += len(prepared.tiles) * self._tokens_per_tile
            else:
                self._sizes.append((prepared.tiles.shape[1], prepared.tiles.shape[2]))
                self._vectors += prepared.rows * prepared.columns
        return self._placed[prepared.digest][2]

    def tiles_of(self, digest: bytes) -> NDArray[np.uint8]:
        """The tiles of a picture that was added, mapped from the file."""
        first, count, _ = self._placed[digest]
        table = self.table()
        return table.tiles[first : first + count] if self._tokens_per_tile else table.pixels_of(first)

    def table(self) -> PictureTable:
        """The pictures so far. At least one was added."""
        assert self._stream is not None
        if self._table is None or len(self._table.digests) < len(self._placed):
            self._stream.flush()
            sizes = None if self._tokens_per_tile else np.array(self._sizes, np.int64)
            shape = (self._tiles, *self._shape) if sizes is None else (int(sizes.prod(1).sum()) * 3,)
            tiles = np.memmap(self._path, np.uint8, "r", shape=shape)
            self._table = PictureTable(tiles, self._preprocessor, self._tokens_per_tile, tuple(self._placed), sizes)
        return self._table

    @property
    def is_empty(self) -> bool:
        """Whether no picture was added."""
        return self._stream is None

    def close(self) -> None:
        """Remove the file; tables that are in use keep their pages."""
        if self._stream is not None:
            self._stream.close()
            self._path.unlink(missing_ok=True)
