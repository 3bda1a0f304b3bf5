"""Characters of valid UTF-8, forwards and backwards, for compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer.data.text.compiled import compiled


@compiled
def code_point(data: np.ndarray, index: int) -> Any:
    """The character that begins at `index`, and its length in bytes."""
    first = np.int64(data[index])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | (np.int64(data[index + 1]) & 0x3F), 2
    second = np.int64(data[index + 1]) & 0x3F
    third = np.int64(data[index + 2]) & 0x3F
    if first < 0xF0:
        return (first & 0x0F) << 12 | second << 6 | third, 3
    return (first & 0x07) << 18 | second << 12 | third << 6 | (np.int64(data[index + 3]) & 0x3F), 4


@compiled
def previous(data: np.ndarray, index: int) -> Any:
    """Where the character begins that ends before `index`."""
    index -= 1
    while data[index] & 0xC0 == 0x80:
        index -= 1
    return index
