"""The pictures of a run's batches: prepared once, kept in a file, and read when a batch holds a token of them.

A token of a picture is known by the number of its vector: tile by tile, the tokens of a tile in order. So rows are cut, packed
and put together as those of text, and a batch encodes the tiles that it needs and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.hashing import hash_value
from bessemer.model.vision.preprocessing import Prepared, Preprocessor
from bessemer.model.vision.trained import BatchPictures


@dataclass(frozen=True, eq=False)
class PictureTable:
    """Prepared tiles, (N, side, side, 3) uint8, mapped from a file. digests: of the pictures, in the order of their tiles."""

    tiles: NDArray[np.uint8] = field(repr=False)
    preprocessor: Preprocessor
    tokens_per_tile: int
    digests: tuple[bytes, ...] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures and their order."""
        return hash_value([digest.hex() for digest in self.digests])

    def of_batch(self, vector_of_token_BT: Tensor) -> BatchPictures:
        """The tiles of a batch's tokens, and their tokens' places among the vectors of these. The first tile, which then has no
        token, where a batch has none, so that the encoder's parameters have a gradient in every step."""
        numbers_BT = vector_of_token_BT.cpu()
        is_picture_BT = numbers_BT >= 0
        tiles_N = torch.unique(numbers_BT[is_picture_BT] // self.tokens_per_tile)
        if not len(tiles_N):
            tiles_N = torch.zeros(1, dtype=torch.int64)
        place_BT = torch.searchsorted(tiles_N, (numbers_BT // self.tokens_per_tile).clamp(min=0))
        inside_BT = place_BT * self.tokens_per_tile + numbers_BT % self.tokens_per_tile
        device = vector_of_token_BT.device
        pixels = self.preprocessor.pixels(Prepared(self.tiles[tiles_N.numpy()], 0, 0, b""))
        values = pixels._replace(values=pixels.values.to(device))
        return BatchPictures(values, torch.where(is_picture_BT, inside_BT, -1).to(device))


class PictureFile:
    """Writes prepared pictures to a file, each once; `table` then maps it into memory. A context manager."""

    def __init__(self, path: Path, preprocessor: Preprocessor, tokens_per_tile: int) -> None:
        self._path = path
        self._preprocessor = preprocessor
        self._tokens_per_tile = tokens_per_tile
        self._stream: BinaryIO | None = None
        #: The first tile of each picture, and how many it has.
        self._placed: dict[bytes, tuple[int, int]] = {}
        self._shape: tuple[int, ...] = ()
        self._tiles = 0
        self._table: PictureTable | None = None

    def add(self, prepared: Prepared) -> int:
        """The number of the first vector of a picture, which is written if it is new."""
        if prepared.digest not in self._placed:
            if self._stream is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._path.open("wb")
                self._shape = prepared.tiles.shape[1:]
            assert prepared.tiles.shape[1:] == self._shape, (prepared.tiles.shape, self._shape)
            self._stream.write(np.ascontiguousarray(prepared.tiles).tobytes())
            self._placed[prepared.digest] = self._tiles, len(prepared.tiles)
            self._tiles += len(prepared.tiles)
        return self._placed[prepared.digest][0] * self._tokens_per_tile

    def tiles_of(self, digest: bytes) -> NDArray[np.uint8]:
        """The tiles of a picture that was added, mapped from the file."""
        first, count = self._placed[digest]
        return self.table().tiles[first : first + count]

    def table(self) -> PictureTable:
        """The pictures so far. At least one was added."""
        assert self._stream is not None
        if self._table is None or len(self._table.tiles) < self._tiles:
            self._stream.flush()
            tiles = np.memmap(self._path, np.uint8, "r", shape=(self._tiles, *self._shape))
            self._table = PictureTable(tiles, self._preprocessor, self._tokens_per_tile, tuple(self._placed))
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
