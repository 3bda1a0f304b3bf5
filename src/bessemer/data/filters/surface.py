"""Surface counts of texts: words, capitals, currency marks and links.

One pass over the bytes. Words are runs of bytes other than ASCII white space; capitals are ASCII's, as shouting is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.ascii import is_capital, is_digit, is_letter


class Surface(NamedTuple):
    """Counts by text, each (N,) int64."""

    words: np.ndarray
    #: of ASCII
    letters: np.ndarray
    #: letters in words of three capitals or more without a small letter
    shouted: np.ndarray
    #: $ £ €, and % behind a digit
    currency: np.ndarray
    #: `http` or `www.` at the beginning of a word or behind a bracket or quote
    links: np.ndarray


_FIELDS = len(Surface._fields)
_SPACE, _DOLLAR, _PERCENT, _DOT, _SLASH, _COLON = (ord(sign) for sign in " $%./:")
_H, _P, _S, _T, _W = (ord(letter) for letter in "hpstw")
#: `£` and `€` in UTF-8.
_POUND_1, _POUND_2 = "£".encode()
_EURO_1, _EURO_2, _EURO_3 = "€".encode()


def surface(texts: Texts) -> Surface:
    """The counts of each text."""
    return Surface(*_surface(texts.data, texts.offsets, np.zeros((_FIELDS, len(texts)), np.int64)))


@compiled_allocating
def _surface(data: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    words, letters, shouted, currency, links = counts
    for text in range(len(offsets) - 1):
        at, end = offsets[text], offsets[text + 1]
        while at < end:
            if data[at] <= _SPACE:
                at += 1
                continue
            capitals, small, digits = 0, 0, 0
            while at < end and data[at] > _SPACE:
                byte = data[at]
                if is_capital(byte):
                    capitals += 1
                elif is_letter(byte):
                    small += 1
                    links[text] += _link(data, at, end, offsets[text])
                elif is_digit(byte):
                    digits += 1
                elif byte == _DOLLAR:
                    currency[text] += 1
                elif byte == _PERCENT:
                    currency[text] += digits > 0
                elif byte == _POUND_1 and at + 1 < end:
                    currency[text] += data[at + 1] == _POUND_2
                elif byte == _EURO_1 and at + 2 < end:
                    currency[text] += data[at + 1] == _EURO_2 and data[at + 2] == _EURO_3
                at += 1
            words[text] += 1
            letters[text] += capitals + small
            shouted[text] += capitals if capitals >= 3 and small == 0 else 0
    return counts


@compiled
def _link(data: np.ndarray, at: int, end: int, first: int) -> bool:
    """Whether `http:`, `https:` or `www.` begins here, behind no letter, digit, dot or slash."""
    byte = data[at]
    if (byte != _H and byte != _W) or at + 5 > end:
        return False
    if at > first:
        before = data[at - 1]
        if is_letter(before) or is_digit(before) or before in (_SLASH, _DOT):
            return False
    if byte == _W:
        return bool(data[at + 1] == _W and data[at + 2] == _W and data[at + 3] == _DOT)
    if data[at + 1] != _T or data[at + 2] != _T or data[at + 3] != _P:
        return False
    return bool(data[at + 4] == _COLON or (data[at + 4] == _S and at + 5 < end and data[at + 5] == _COLON))
