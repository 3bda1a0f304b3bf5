"""Bytes of UTF-8 as letters, digits and words, for compiled loops that look no further than ASCII."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.compiled import compiled

_ZERO, _NINE, _LARGE_A, _LARGE_Z, _SMALL_A, _SMALL_Z = (ord(character) for character in "09AZaz")
#: Setting this bit makes an ASCII letter small.
_SMALL = 0x20
_BEYOND = 0x80


@compiled
def is_digit(byte: np.uint8) -> bool:
    """Whether it is an ASCII digit."""
    return bool(_ZERO <= byte <= _NINE)


@compiled
def is_letter(byte: np.uint8) -> bool:
    """Whether it is an ASCII letter."""
    return bool(_SMALL_A <= (byte | _SMALL) <= _SMALL_Z)


@compiled
def is_capital(byte: np.uint8) -> bool:
    """Whether it is an ASCII capital."""
    return bool(_LARGE_A <= byte <= _LARGE_Z)


@compiled
def in_word(byte: np.uint8) -> bool:
    """Whether it is an ASCII letter or digit, or of a character beyond ASCII."""
    return bool(byte >= _BEYOND or is_digit(byte) or is_letter(byte))


@compiled
def small(byte: np.uint8) -> np.uint8:
    """The byte, an ASCII capital as small letter."""
    return np.uint8(byte | _SMALL) if is_capital(byte) else np.uint8(byte)
