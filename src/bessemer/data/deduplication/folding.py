"""Folding of characters for comparison: a table from code points to what is hashed in their place."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Literal

import numpy as np

from bessemer.data.text.script_ranges import WITHOUT_SPACES
from bessemer.data.text.scripts import IDEOGRAPHIC_PLANES

#: Code points below have an entry. Beyond lie rare ideographs, each a word of its own, and private use.
LIMIT = IDEOGRAPHIC_PLANES
#: What an entry may say besides the code point that is hashed.
SEPARATOR, IGNORED = 0, -1
# a word by itself: scripts that put no space between words
ALONE = 1 << 24
# a run of these, with one decimal part, counts as a single 0
DIGIT = 1 << 25

Folding = Literal["similar", "words", "exact"]


@cache
def fold_table(folding: Folding) -> np.ndarray:
    """The table, (LIMIT,) int32: a code point to hash, perhaps with the flag ALONE or DIGIT, or SEPARATOR, or IGNORED.

    `similar`: lower case, accents and invisible characters gone, every number a 0, punctuation and symbols separate words.
    `words`: the same, but numbers keep their digits. `exact`: every character is itself and white space alone separates.
    """
    table = np.fromiter((_folded(chr(code), folding) for code in range(LIMIT)), dtype=np.int32, count=LIMIT)
    for first, last in WITHOUT_SPACES:
        for code in range(first, last + 1):
            if table[code] > 0 and unicodedata.category(chr(code)) != "Nd":
                table[code] |= ALONE
    table.setflags(write=False)
    return table


def _folded(character: str, folding: Folding) -> int:
    if folding == "exact":
        return SEPARATOR if character.isspace() else ord(character)
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf"):
        return IGNORED
    if category == "Nd":
        return DIGIT if folding == "similar" else ord("0") + unicodedata.decimal(character)
    if category[0] in "PSZC":
        return SEPARATOR
    decomposed = unicodedata.normalize("NFD", character.lower())
    bare = "".join(part for part in decomposed if unicodedata.category(part) != "Mn")
    # a syllable of Hangul, a vowel sign in two halves: what is not one character stays as it is
    return ord(bare) if len(bare) == 1 else ord(character)
