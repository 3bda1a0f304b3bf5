"""Words of UTF-8 text as 64-bit hashes, and hashes of runs of words: what all methods compare.

Characters are folded first, by a table from code points to what is hashed in their place (case, accents, punctuation).
Everything is integer arithmetic modulo 2^64, so that a text has the same hashes on every machine.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Literal

import numpy as np

from bessemer.data.text.characters import FIRST_IDEOGRAPH, IDEOGRAPHIC_PLANES, IDEOGRAPHS_PER_WORD, LETTERS_PER_WORD
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.word_rules import WITHOUT_SPACES

#: Code points below have an entry. Beyond lie rare ideographs, each a word of its own, and private use.
LIMIT = IDEOGRAPHIC_PLANES
#: Entries that are no code point to hash.
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


# FNV-1a's (Fowler, Noll, Vo)
_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
# SplitMix64's (Steele et al. 2014)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
#: Base of the polynomial over word hashes that stands for a run of words. Odd, else early words would be shifted out.
BASE = np.uint64(0x9E3779B97F4A7C15)

_SPACE, _TAB, _RETURN = ord(" "), ord("\t"), ord("\r")
_ZERO, _POINT, _COMMA, _NINE = ord("0"), ord("."), ord(","), ord("9")


@compiled
def mixed(value: np.uint64) -> np.uint64:
    """A bijection of 64 bits that spreads every input bit over all output bits."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@compiled
def _decoded(data: np.ndarray, position: int, end: int) -> tuple[int, int]:
    """Code point that begins at a byte over 127, and its width; what is cut off at `end` is a replacement character."""
    byte = data[position]
    width = 2 if byte < 0xE0 else (3 if byte < 0xF0 else 4)
    if byte < 0xC0 or position + width > end:
        return 0xFFFD, 1
    code = int(byte) & (0x7F >> width)
    for offset in range(1, width):
        code = code << 6 | int(data[position + offset]) & 0x3F
    return code, width


@compiled
def hash_words(
    data: np.ndarray, position: int, end: int, fold: np.ndarray, hashes: np.ndarray, places: np.ndarray, count: int
) -> tuple[int, int]:
    """Hash the words of `data[position:end]` into `hashes[count:]`, until that is full.

    data (bytes,) uint8 of valid UTF-8; fold from `fold_table`; hashes (M,) uint64; places (M, 2) int64 takes each word's first
    byte and the one after its last, unless it has no rows. Returns how many hashes there are now and where to go on.
    """
    # first byte of the current word; -1 between words
    begin = -1
    word = _OFFSET
    # -1 outside a number, 0 in its whole part, 1 in its decimal part
    decimals = -1
    while position < end:
        byte = data[position]
        if byte < 128:
            width = 1
            folded = fold[byte]
        else:
            code, width = _decoded(data, position, end)
            folded = fold[code] if code < LIMIT else np.int32(code | ALONE)
        if folded == SEPARATOR:
            if decimals == 0 and byte in (_POINT, _COMMA) and position + 1 < end:
                following = data[position + 1]
                if _ZERO <= following <= _NINE:
                    decimals = 1
                    position += 1
                    continue
            if begin >= 0:
                count = _finish(word, begin, position, hashes, places, count)
                begin = -1
            decimals = -1
        elif folded != IGNORED:
            alone = folded & ALONE != 0
            if begin < 0 or alone:
                if begin >= 0:
                    count = _finish(word, begin, position, hashes, places, count)
                    begin = -1
                if count == len(hashes):
                    return count, position
                begin = position
                word = _OFFSET
                decimals = -1
            if folded & DIGIT:
                if decimals < 0:
                    word = (word ^ np.uint64(_ZERO)) * _PRIME
                    decimals = 0
            else:
                word = (word ^ np.uint64(folded)) * _PRIME
                decimals = -1
            if alone:
                count = _finish(word, begin, position + width, hashes, places, count)
                begin = -1
        position += width
    if begin >= 0:
        count = _finish(word, begin, end, hashes, places, count)
    return count, position


@compiled
def _finish(word: np.uint64, begin: int, end: int, hashes: np.ndarray, places: np.ndarray, count: int) -> int:
    hashes[count] = mixed(word)
    if len(places):
        places[count, 0] = begin
        places[count, 1] = end
    return count + 1


@compiled
def length_in_words(data: np.ndarray, position: int, end: int, fold: np.ndarray, hashed: int) -> int:
    """How many words `data[position:end]` is long, of which `hash_words` made `hashed`.

    In scripts without spaces that hashes each character by itself, of which several say as much as a word.
    """
    ideographs = letters = 0
    while position < end:
        code, width = int(data[position]), 1
        if code >= 128:
            code, width = _decoded(data, position, end)
        # an ignored character is -1
        if code >= LIMIT or (fold[code] > 0 and fold[code] & ALONE):
            if code >= FIRST_IDEOGRAPH:
                ideographs += 1
            else:
                letters += 1
        position += width
    words = -(-ideographs // IDEOGRAPHS_PER_WORD) - (-letters // LETTERS_PER_WORD)
    return hashed - ideographs - letters + words


@compiled
def is_white(byte: int) -> bool:
    """Whether this byte is one of ASCII's white space."""
    return byte == _SPACE or _TAB <= byte <= _RETURN


@compiled
def most_words(size: int) -> int:
    """No text of `size` bytes has more words: each but the last takes a byte and a separator, or a character of 3 bytes."""
    return size // 2 + 1


@compiled_allocating
def count_words(data: np.ndarray, position: int, end: int, fold: np.ndarray) -> int:
    """The number of words in `data[position:end]`."""
    block = np.empty(64, dtype=np.uint64)
    nowhere = np.empty((0, 2), dtype=np.int64)
    total = 0
    while position < end:
        count, position = hash_words(data, position, end, fold, block, nowhere, 0)
        total += count
    return total


@compiled
def run_hash(hashes: np.ndarray, first: int, length: int) -> np.uint64:
    """Hash of the words `first` to `first + length`."""
    value = np.uint64(length)
    for index in range(first, first + length):
        value = value * BASE + hashes[index]
    return mixed(value)


@compiled
def run_hashes(hashes: np.ndarray, count: int, length: int, runs: np.ndarray) -> int:
    """Hashes of all runs of `length` among the first `count` words, as `run_hash` gives them, each in constant time.

    Writes runs[:count - length + 1] and returns their number, at least 0.
    """
    if count < length:
        return 0
    # the power of the base at the run's first word
    oldest = np.uint64(1)
    value = np.uint64(0)
    for index in range(length):
        value = value * BASE + hashes[index]
        oldest *= BASE if index else np.uint64(1)
    head = np.uint64(length) * oldest * BASE
    runs[0] = mixed(head + value)
    for index in range(length, count):
        value = (value - hashes[index - length] * oldest) * BASE + hashes[index]
        runs[index - length + 1] = mixed(head + value)
    return count - length + 1
