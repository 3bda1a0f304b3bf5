"""HTML elements as the parser knows them: how they nest, what ends them, and how their text is laid out."""

from __future__ import annotations

import numpy as np

#: Bits of `TRAITS`.
# begins and ends a block of text
BLOCK = 1 << 0
# has no end tag
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
    """Where a packed name's search begins; the parser computes the same."""
    return (packed ^ (packed >> 9) ^ (packed >> 23)) & 511


#: (elements,) int64: the bits of each element.
TRAITS = _traits()
#: (512,) int64 each: packed names, and the numbers of their elements.
TAG_KEYS, TAG_NUMBERS = _slots()
