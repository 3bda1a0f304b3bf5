"""Measures that several filters share: ratios, rounding, repeated lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from bessemer.data.text.compiled import compiled
from bessemer.data.text.lines import Lines


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, float64, and zero where `whole` is."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)


#: Digits of a stored score that comes from `exp`, `log` or a sum of floats: the last ones differ between processors, and
#: neither files nor limits may. Coarse enough for every error of those, fine enough for every limit.
_DECIMALS = 6


def rounded(scores: np.ndarray) -> pa.Array:
    """Scores as they are stored, float64."""
    # no negative zero
    return pa.array(np.round(scores, _DECIMALS).astype(np.float64) + 0.0)


def columns(scores: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
    """Arrow arrays of float64."""
    return {name: pa.array(values, pa.float64()) for name, values in scores.items()}


def repeated(lines: Lines, considered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each text, how many of the lines `considered` (K,) bool were there before in it, and their characters: (N,) int64."""
    texts = len(lines.of_text) - 1
    size = table_size(int(lines.counts.max(initial=0)))
    keys, owners = np.empty(size, np.uint64), np.zeros(size, np.int64)
    counts, characters = np.zeros(texts, np.int64), np.zeros(texts, np.int64)
    _count_repeated(lines.hashes, lines.characters, considered, lines.of_text, keys, owners, counts, characters)
    return counts, characters


def table_size(entries: int) -> int:
    """Slots of a table for a number of entries: a power of two, half of which stay free."""
    return 1 << max(4, (2 * entries - 1).bit_length())


@compiled
def occupied(keys: np.ndarray, owners: np.ndarray, mask: int, key: np.uint64, owner: int) -> Any:
    """The slot of `key` among the keys of `owner`, or the first one free for it, of a table of `mask + 1` slots.

    A slot whose owner is another one is free: so a table is emptied by going on to the next owner.
    """
    slot = np.int64(key & np.uint64(mask))
    while owners[slot] == owner and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _count_repeated(
    hashes: np.ndarray,
    characters: np.ndarray,
    considered: np.ndarray,
    of_text: np.ndarray,
    keys: np.ndarray,
    owners: np.ndarray,
    counts: np.ndarray,
    repeated_characters: np.ndarray,
) -> None:
    mask = len(keys) - 1
    for text in range(len(of_text) - 1):
        for line in range(of_text[text], of_text[text + 1]):
            if not considered[line]:
                continue
            slot = occupied(keys, owners, mask, hashes[line], text + 1)
            if owners[slot] == text + 1:
                counts[text] += 1
                repeated_characters[text] += characters[line]
            else:
                owners[slot] = text + 1
                keys[slot] = hashes[line]
