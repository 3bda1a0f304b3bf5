"""HTML elements as the parser knows them, and the words in attributes and text that tell what a part of a page is for.

Elements: how they nest, what ends them, how their text is laid out. An attribute's value is cut into words at punctuation and
at capitals (`entry-content`, `entryContent`). A word is looked up alone, joined to the one before it (`entrycontent`), and,
for what hides an element, as the whole class name. `word*` stands for every word that begins so. Words in the text (cues) are
looked up in short blocks only.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np

#: Bits of `TRAITS`.
# begins and ends a block of text
BLOCK = 1 << 0
# a void element: it has no end tag
VOID = 1 << 1
# its content is not markup, up to the element's own end tag
RAW = 1 << 2
# its start tag ends an open paragraph
ENDS_P = 1 << 3
# end tags and implied ends inside do not reach beyond it
WALL = 1 << 4
# items end inside it
LIST = 1 << 5
HEADING = 1 << 6
# its content is no text of the page: controls, drawings, fallbacks
DROPPED = 1 << 7
# its end tag may close what is open inside it, whatever that is
TABLE_PART = 1 << 8
PREFORMATTED = 1 << 9

_BLOCKS = """address article aside blockquote body center dd details dialog dir div dl dt fieldset figcaption figure footer
form h1 h2 h3 h4 h5 h6 header hgroup legend li listing main menu nav ol optgroup option p pre search section summary table
tbody td tfoot th thead tr ul caption hr"""
_INLINE = """a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark meter nobr output progress q rp rt
ruby s samp small span strike strong sub sup time tt u var html head math annotation noscript"""
_TRAITS = {
    VOID: "area base br col embed hr img input link meta param source track wbr frame basefont bgsound keygen",
    RAW: "script style textarea title xmp iframe noembed noframes",
    ENDS_P: """address article aside blockquote center details dialog dir div dl dd dt fieldset figcaption figure footer form
        h1 h2 h3 h4 h5 h6 header hgroup hr li listing main menu nav ol p pre search section summary table ul""",
    WALL: "td th caption table button object template marquee",
    LIST: "ul ol dl dir menu table td th",
    HEADING: "h1 h2 h3 h4 h5 h6",
    DROPPED: "button select datalist canvas audio video object template svg applet map frameset annotation noscript rp",
    TABLE_PART: "table thead tbody tfoot tr td th caption",
    PREFORMATTED: "pre listing xmp",
}

#: Element names by number; 0 is every element that HTML does not know.
NAMES: list[str] = [
    "",
    *sorted({*_BLOCKS.split(), *_INLINE.split(), *(n for names in _TRAITS.values() for n in names.split())}),
]
NUMBER: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

#: Longest name that `pack` distinguishes; 37^12 < 2^63.
LONGEST_NAME = 12


def pack(name: str) -> int:
    """A name of at most 12 letters and digits as a number: base 37, so that the parser compares names without a copy."""
    number = 0
    for byte in name.encode():
        number = number * 37 + (byte - 96 if byte >= 97 else byte - 48 + 27)
    return number


def _traits() -> np.ndarray:
    table = np.zeros(len(NAMES), np.int64)
    for name in _BLOCKS.split():
        table[NUMBER[name]] |= BLOCK
    for bit, names in _TRAITS.items():
        for name in names.split():
            table[NUMBER[name]] |= bit
    return table


def _slots() -> tuple[np.ndarray, np.ndarray]:
    """An open-addressed table from packed name to number."""
    keys, values = np.zeros(512, np.int64), np.zeros(512, np.int64)
    for number, name in enumerate(NAMES):
        if number:
            slot = slot_of(pack(name))
            while keys[slot]:
                slot = (slot + 1) & 511
            keys[slot], values[slot] = pack(name), number
    return keys, values


def slot_of(packed: int) -> int:
    """The slot at which a packed name's search begins; the parser computes the same."""
    return (packed ^ (packed >> 9) ^ (packed >> 23)) & 511


#: (elements,) int64: the bits of each element.
TRAITS = _traits()
#: (512,) int64 each: packed names, and the numbers of their elements.
TAG_KEYS, TAG_NUMBERS = _slots()


_FNV_START, _FNV_PRIME, _64_BITS = 0xCBF29CE484222325, 0x100000001B3, (1 << 64) - 1

_WORDS = tomllib.loads(Path(__file__).with_name("vocabulary.toml").read_text(encoding="utf-8"))
#: What a part of a page is, by the words in its class, id, role and itemprop.
ROLES: dict[str, str] = _WORDS["roles"]
#: Words of the text itself that often stand in short blocks around the main text, by what they announce.
CUES: dict[str, str] = _WORDS["cues"]
# The order of the names is that of the bits, which compiled loops hold: Numba compiles anew when this file changes, not when
# the table of words does.
_NAMES = """
    hidden body article main comment navigation breadcrumb footer header sidebar related share advertising consent meta
    author_box subscribe popup caption media teaser pagination search forum signature contents tool lead product code
    reference share related comment legal meta subscribe navigation advertising
"""
assert [*ROLES, *CUES] == _NAMES.split()
ROLE_BIT: dict[str, int] = {name: 1 << number for number, name in enumerate(ROLES)}
CUE_BIT: dict[str, int] = {name: 1 << number for number, name in enumerate(CUES)}
#: The bit of a function word, behind those of the cues.
FUNCTION_BIT = 1 << len(CUES)

#: How an entry of the table may match.
WORD, PREFIX, WHOLE = 1, 2, 4


def fnv(text: str, state: int = _FNV_START) -> int:
    """FNV-1a of the UTF-8 bytes, 64 bits: cheap to continue byte by byte, which is how the parser looks up prefixes."""
    for byte in text.encode():
        state = ((state ^ byte) * _FNV_PRIME) & _64_BITS
    return state


def hash_table(entries: dict[tuple[str, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """An open-addressed table of hashes, (slots,) uint64, with each entry's bits by way of matching, (slots, 3) int64."""
    merged: dict[int, list[int]] = {}
    for (word, how), bits in entries.items():
        bits_of_word = merged.setdefault(fnv(word), [0, 0, 0])
        for place, way in enumerate((WORD, PREFIX, WHOLE)):
            bits_of_word[place] |= bits if how & way else 0
    slots = 1 << (len(merged) * 4).bit_length()
    keys = np.zeros(slots, np.uint64)
    bits_of = np.zeros((slots, 3), np.int64)
    for key, bits_by_way in merged.items():
        slot = key & (slots - 1)
        while keys[slot]:
            slot = (slot + 1) & (slots - 1)
        keys[slot] = key
        bits_of[slot] = bits_by_way
    return keys, bits_of


def _role_entries() -> dict[tuple[str, int], int]:
    entries: dict[tuple[str, int], int] = {}
    for role, words in ROLES.items():
        for word in words.split():
            how = WHOLE if word.startswith("=") else PREFIX if word.endswith("*") else WORD
            key = word.strip("=*").replace("-", "").lower()
            entries[key, how] = entries.get((key, how), 0) | ROLE_BIT[role]
    return entries


def _cue_entries() -> dict[tuple[str, int], int]:
    entries: dict[tuple[str, int], int] = {}
    for bit, words in [
        *((CUE_BIT[cue], words) for cue, words in CUES.items()),
        (FUNCTION_BIT, _WORDS["sentences"]["function_words"]),
    ]:
        for word in words.split():
            for key in {word.lower(), word.capitalize()}:
                # the kernel lowers ASCII only, so that a capital umlaut needs an entry of its own
                key = key[0] + key[1:].lower() if ord(key[0]) > 127 else key.lower()
                entries[key, WORD] = entries.get((key, WORD), 0) | bit
    return entries


ROLE_KEYS, ROLE_BITS = hash_table(_role_entries())
CUE_KEYS, CUE_BITS = hash_table(_cue_entries())
