"""What a text looks like before one reads it: counts of words, capitals, currency marks and links, for the filters that ask.

One pass over the bytes. Words are runs of bytes other than ASCII white space; capitals are ASCII's, as shouting is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from bessemer.data.text.compiled import compiled
from bessemer.data.text.texts import Texts


class Surface(NamedTuple):
    """Counts by text, each (N,) int64."""

    words: np.ndarray
    letters: np.ndarray  #: of ASCII
    shouted: np.ndarray  #: letters in words of three capitals or more without a small letter
    currency: np.ndarray  #: $ £ €, and % behind a digit
    links: np.ndarray  #: `http` or `www.` at the beginning of a word or behind a bracket or quote


_FIELDS = len(Surface._fields)


def surface(texts: Texts) -> Surface:
    """The counts of each text."""
    return Surface(*_surface(texts.data, texts.offsets, np.zeros((_FIELDS, len(texts)), np.int64)))


@njit(cache=True, nogil=True)
def _surface(data: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    words, letters, shouted, currency, links = counts
    for text in range(len(offsets) - 1):
        at, end = offsets[text], offsets[text + 1]
        while at < end:
            if data[at] <= 0x20:
                at += 1
                continue
            capitals, small, digits = 0, 0, 0
            while at < end and data[at] > 0x20:
                byte = data[at]
                if 97 <= byte <= 122:
                    small += 1
                    links[text] += _link(data, at, end, offsets[text])
                elif 65 <= byte <= 90:
                    capitals += 1
                elif 48 <= byte <= 57:
                    digits += 1
                elif byte == 36:
                    currency[text] += 1
                elif byte == 37:
                    currency[text] += digits > 0
                elif byte == 0xC2 and at + 1 < end:
                    currency[text] += data[at + 1] == 0xA3
                elif byte == 0xE2 and at + 2 < end:
                    currency[text] += data[at + 1] == 0x82 and data[at + 2] == 0xAC
                at += 1
            words[text] += 1
            letters[text] += capitals + small
            shouted[text] += capitals if capitals >= 3 and small == 0 else 0
    return counts


@compiled
def _link(data: np.ndarray, at: int, end: int, first: int) -> bool:
    """Whether `http:`, `https:` or `www.` begins here and no letter or digit stands before."""
    byte = data[at]
    if (byte != 104 and byte != 119) or at + 5 > end:
        return False
    if at > first and (
        97 <= (data[at - 1] | 32) <= 122 or 48 <= data[at - 1] <= 57 or data[at - 1] == 47 or data[at - 1] == 46
    ):
        return False
    if byte == 119:
        return bool(data[at + 1] == 119 and data[at + 2] == 119 and data[at + 3] == 46)
    if data[at + 1] != 116 or data[at + 2] != 116 or data[at + 3] != 112:
        return False
    return bool(data[at + 4] == 58 or (data[at + 4] == 115 and at + 5 < end and data[at + 5] == 58))
