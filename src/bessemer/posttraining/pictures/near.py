"""Near-duplicates of pictures: perceptual hashes of 64 bits, and earlier ones within a distance, found without comparing all.

A copy that was made smaller, saved again or brightened keeps most bits; unlike pictures differ in about half of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.model.vision.pictures import Picture

# Shapes: N bits of a hash's side, 8; S samples of a side.

_SIDE, _SAMPLES = 8, 32
_BANDS, _BAND_BITS = 4, 16
#: Deviation of the brightness below which a picture shows nothing and has no hash to compare.
_BLANK = 2.0


class Hashes(NamedTuple):
    """pHash and dHash of a picture, the first bit the highest."""

    frequencies: int
    gradients: int

    def __str__(self) -> str:
        return f"{self.frequencies:016x}"


def is_blank(picture: Picture) -> bool:
    """Whether nothing is to be seen: a spacer, a plain area."""
    return float(_grey(picture, _SAMPLES, _SAMPLES).std()) < _BLANK


def hashes_of(picture: Picture) -> Hashes:
    """The perceptual hashes of a picture."""
    return Hashes(perceptual_hash(picture), difference_hash(picture))


def perceptual_hash(picture: Picture) -> int:
    """pHash: which of the 8 × 8 lowest frequencies of the brightness, on 32 × 32 samples, are above their median (Zauner 2010,
    section 3.2.1; the bits of ImageHash's `phash`)."""
    grey_SS = _grey(picture, _SAMPLES, _SAMPLES)
    cosines_NS = _cosines()
    lowest_NN = cosines_NS @ grey_SS @ cosines_NS.T
    return _packed(lowest_NN > np.median(lowest_NN))


def difference_hash(picture: Picture) -> int:
    """dHash: which of 9 samples in each of 8 rows are brighter than the one before (the bits of ImageHash's `dhash`)."""
    grey = _grey(picture, _SIDE + 1, _SIDE)
    return _packed(grey[:, 1:] > grey[:, :-1])


def _grey(picture: Picture, width: int, height: int) -> NDArray[np.float64]:
    from PIL import Image

    grey = Image.fromarray(picture.rgb).convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(grey, np.float64)


@cache
def _cosines() -> NDArray[np.float64]:
    """The first 8 rows of the cosine transform (DCT-II) of 32 samples."""
    frequency_N1, place_S = np.arange(_SIDE)[:, None], np.arange(_SAMPLES)
    cosines_NS: NDArray[np.float64] = 2 * np.cos(np.pi * frequency_N1 * (2 * place_S + 1) / (2 * _SAMPLES))
    return cosines_NS


def _packed(bits: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class EarlierPictures:
    """Pictures by their hashes; one is looked up among all before it.

    A hash is cut into 4 bands of 16 bits. Where two hashes differ in at most d bits, some band of theirs differs in at most
    ⌊d / 4⌋, so only pictures with one of the bands in that distance are compared (Norouzi et al. 2012).
    """

    def __init__(self, distance: int) -> None:
        """distance: most bits of the pHash in which a near-duplicate differs, and half of those of its dHash."""
        self._distance = distance
        self._flips = [sum(1 << bit for bit in bits) for bits in _flips(distance // _BANDS)]
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(_BANDS)]
        self._hashes: list[Hashes] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def nearest(self, hashes: Hashes) -> int | None:
        """The number of an earlier picture that this one is a copy of, the least distant; None where there is none."""
        numbers = {
            number
            for band, value in zip(self._bands, _bands(hashes.frequencies), strict=True)
            for flip in self._flips
            for number in band.get(value ^ flip, ())
        }
        near = [(distance, number) for number in numbers if (distance := self._distance_to(hashes, number)) is not None]
        return min(near)[1] if near else None

    def add(self, hashes: Hashes) -> int:
        """Remember a picture. Returns its number."""
        number = len(self._hashes)
        self._hashes.append(hashes)
        for band, value in zip(self._bands, _bands(hashes.frequencies), strict=True):
            band.setdefault(value, []).append(number)
        return number

    def _distance_to(self, hashes: Hashes, number: int) -> int | None:
        other = self._hashes[number]
        distance = (hashes.frequencies ^ other.frequencies).bit_count()
        is_near = distance <= self._distance and (hashes.gradients ^ other.gradients).bit_count() <= 2 * self._distance
        return distance if is_near else None


def _bands(value: int) -> Iterator[int]:
    for band in range(_BANDS):
        yield value >> (band * _BAND_BITS) & ((1 << _BAND_BITS) - 1)


def _flips(most: int) -> Iterator[tuple[int, ...]]:
    for count in range(most + 1):
        yield from combinations(range(_BAND_BITS), count)
