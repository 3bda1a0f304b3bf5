"""Character classes: a table of bit sets by code point for compiled loops.

White space, letters, case and categories are those of Python's own Unicode tables, so that `str.isspace` and the loops
agree. Built once per process in some 0.2 s. A newer Python knows newer characters.
"""

from __future__ import annotations

import string
import sys
import unicodedata
from functools import cache

import numpy as np

#: `str.isspace`
SPACE = 1 << 0
#: where `str.splitlines` cuts
LINE_BREAK = 1 << 1
#: `str.isalpha`
LETTER = 1 << 2
#: may end a sentence's last word: a letter in lower case or of a script without case, a vowel sign or another combining mark,
#: a joiner
LOWER = 1 << 3
#: a letter that may begin a sentence: upper case, or of a script without case
UPPER = 1 << 4
#: 0 to 9
DIGIT = 1 << 5
#: any of Unicode's categories P*
PUNCTUATION = 1 << 6
#: ends a sentence
TERMINAL = 1 << 7
#: a word of such characters alone is not counted as one by Gopher's rules
SYMBOL = 1 << 8
#: quotation marks, brackets among them where a script uses those
QUOTE = 1 << 9
#: is a word of its own at the beginning and at the end of others
AFFIX = 1 << 10
#: is a word of its own anywhere
PICTURE = 1 << 11
CURRENCY = 1 << 12
#: joins two words
HYPHEN = 1 << 13
#: may stand in a domain's name
HOST = 1 << 14
#: no rule about the insides of a word looks at it: letters, and characters without a rule
PLAIN = 1 << 15

#: Unicode's property Sentence_Terminal, and the full stops of a few scripts beside it.
_TERMINALS = """
    21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6
    17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E 2E3C
    2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01
    FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF
    11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43
    11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88
"""
_LINE_BREAKS = "\n\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"
_QUOTES = "'\"`´‘’‚,„“”»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧"
#: Besides these, every mark that ends a sentence.
_AFFIXES = _QUOTES + "….,:;¿¡()[]{}<>_#*&，、；：～·،؛٪፣፤፥፦"
_CURRENCIES = "$£€¥฿﷼" + "".join(map(chr, range(0x20A0, 0x20C0)))
_HYPHENS = "-–—~"
#: Beyond ASCII, controls and sentence ends: what datatrove, whose counts the usual limits were made for, takes for no word.
#: The last four are Ethiopic commas, which it leaves on their words.
_SYMBOLS = "—”：％１〈、━【「」，】；“《„’«∶´（–～»〉》…►፣፤፥፦"
#: Zero-width joiners end words of Malayalam, Persian and others.
_JOINERS = (0x200C, 0x200D)
#: What rules look at besides affixes, currencies and hyphens.
_OPERATORS = "%§=+^/|²°"

#: Of the planes above these no code point is a letter, a space or a mark.
_PLANES = (range(0x40000), range(0xE0000, 0xE0200))


@cache
def character_classes() -> np.ndarray:
    """The bit set of each code point, (0x110000,) uint16."""
    classes = np.zeros(sys.maxunicode + 1, dtype=np.uint16)
    for plane in _PLANES:
        classes[plane.start : plane.stop] = [_by_category(unicodedata.category(chr(code))) for code in plane]
    spaces = [code for code in range(0x3001) if chr(code).isspace()]
    listed = {
        SPACE: spaces,
        LINE_BREAK: map(ord, _LINE_BREAKS),
        DIGIT: map(ord, string.digits),
        TERMINAL: _code_points(_TERMINALS),
        SYMBOL: [
            *_code_points(_TERMINALS),
            *map(ord, string.punctuation + _SYMBOLS),
            *range(9),
            *range(11, 32),
            *range(127, 160),
        ],
        QUOTE: map(ord, _QUOTES),
        AFFIX: {*map(ord, _AFFIXES), *_code_points(_TERMINALS)} - {ord(".")},  # a full stop has rules of its own
        LOWER: _JOINERS,
        CURRENCY: map(ord, _CURRENCIES),
        HYPHEN: map(ord, _HYPHENS),
        HOST: map(ord, string.ascii_letters + string.digits + "-_."),
    }
    for kind, codes in listed.items():
        classes[list(codes)] |= kind
    classes[0xA1:0x10000] |= HOST
    ruled = (classes & (SPACE | DIGIT | AFFIX | PICTURE | CURRENCY | HYPHEN)) != 0
    ruled[[ord(character) for character in "." + _OPERATORS]] = True
    classes[~ruled] |= PLAIN
    return classes


def _by_category(category: str) -> int:
    if category[0] == "L":
        case = {"Ll": LOWER, "Lu": UPPER, "Lt": UPPER}.get(category, LOWER | UPPER)
        return LETTER | case
    if category[0] == "M":
        return LOWER
    if category[0] == "P":
        return PUNCTUATION
    return PICTURE if category == "So" else 0


def _code_points(ranges: str) -> list[int]:
    """Of hexadecimal numbers and ranges: `21 589 61D-61F`."""
    found: list[int] = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        found += range(int(first, 16), int(last or first, 16) + 1)
    return found
