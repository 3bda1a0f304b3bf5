"""Hashes of bytes, and small hash tables, for compiled loops.

Hashes are of 64 bits. Two different words, lines or n-grams of one text share one with a probability of about n²/2⁶⁵, so they
are compared by it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bessemer.data.text.compiled import compiled

_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(32)


@compiled
def hash_bytes(data: np.ndarray, start: int, end: int) -> Any:
    """Of `data[start:end]`, uint64: FNV-1a (Fowler, Noll and Vo), its bits mixed at the end so that any of them may be used."""
    value = _SEED
    for index in range(start, end):
        value = (value ^ np.uint64(data[index])) * _PRIME
    value = (value ^ (value >> _HALF)) * _MIX
    return value ^ (value >> _HALF)


@compiled
def slot_of(keys: np.ndarray, key: Any) -> Any:
    """Where `key` is in an open-addressing table of 2^k keys, or the free slot (a zero) where it belongs."""
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while keys[slot] != key and keys[slot] != 0:
        slot = (slot + np.uint64(1)) & mask
    return slot


def table_of(entries: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """A table from the hash of each key to its value: keys uint64 and values int64, 2^k of each, at most a quarter in use."""
    size = 1 << (4 * max(1, len(entries)) - 1).bit_length()
    keys, values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    for spelt, value in entries.items():
        key = np.uint64(hash_bytes(np.frombuffer(spelt, np.uint8), 0, len(spelt)))
        slot = slot_of(keys, key)
        keys[slot], values[slot] = key, value
    return keys, values


@compiled
def longest_text(offsets: np.ndarray) -> int:
    """Bytes of the longest of some texts, at least 1."""
    longest = 1
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    return longest
