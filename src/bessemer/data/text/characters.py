"""Characters for compiled loops: classes by code point, UTF-8, ASCII, scripts without spaces; addresses of pages and people.

Classes are a table of bit sets. White space, letters, case and categories are those of Python's own Unicode tables, so that
`str.isspace` and the loops agree. Built once per process in some 0.2 s. A newer Python knows newer characters. For each script
the loops know what stands between words and behind sentences in the place of a space and a full stop. An address is one word,
however many hyphens it has.
"""

from __future__ import annotations

import string
import sys
import unicodedata
from functools import cache
from typing import Any

import numpy as np

from bessemer.data.text.compiled import compiled
from bessemer.data.text.word_rules import WITHOUT_SPACES

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
#: has no rule that cuts inside words: letters, and characters without a rule
PLAIN = 1 << 15

#: Unicode's property Sentence_Terminal, and further full stops of a few scripts.
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
#: Characters with rules of their own, other than affixes, currencies and hyphens.
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
    """Code points from hexadecimal numbers and ranges: `21 589 61D-61F`."""
    found: list[int] = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        found += range(int(first, 16), int(last or first, 16) + 1)
    return found


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
    """The first byte of the character that ends before `index`."""
    index -= 1
    while data[index] & 0xC0 == 0x80:
        index -= 1
    return index


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


#: Tibetan has marks between syllables, and spaces between clauses alone.
_TIBETAN = (0x0F00, 0x0FFF)
#: Of the scripts without spaces those below are Thai, Lao, Tibetan, Burmese and Khmer, those from here on Chinese and Japanese.
FIRST_IDEOGRAPH = 0x3000
#: Characters that say as much as an English word: in the Universal Declaration of Human Rights 1.5 of Chinese, 2.6 of Japanese
#: and 5 of Thai do.
IDEOGRAPHS_PER_WORD, LETTERS_PER_WORD = 2, 5
#: Stands between words in Ethiopic, where a space does not.
ETHIOPIC_WORDSPACE = 0x1361
_WORDSPACE_BYTES = 3
_COLON, _FIRST_ARMENIAN, _LAST_ARMENIAN, _FIRST_ETHIOPIC, _LAST_ETHIOPIC = ord(":"), 0x531, 0x588, 0x1200, 0x135A
# characters
_NEAR = 12
#: Here the planes of rare ideographs begin.
IDEOGRAPHIC_PLANES = 0x20000


@compiled
def is_without_spaces(code: int) -> bool:
    """Whether a code point belongs to such a script."""
    if code < 0x0E01:
        return False
    for first, last in WITHOUT_SPACES:
        if first <= code <= last:
            return True
    return bool(_TIBETAN[0] <= code <= _TIBETAN[1] or IDEOGRAPHIC_PLANES <= code < 0x40000)


@compiled
def without_wordspace(data: np.ndarray, first: int, end: int) -> int:
    """The end of `data[first:end]` without the Ethiopic marks between words that may stand behind the last word too."""
    while end - first > _WORDSPACE_BYTES and code_point(data, previous(data, end))[0] == ETHIOPIC_WORDSPACE:
        end -= _WORDSPACE_BYTES
    return end


@compiled
def is_colon_full_stop(data: np.ndarray, first: int, end: int) -> bool:
    """Whether `data[first:end]` ends in a colon that is a full stop: `:` or `::` near a letter of Armenian or Ethiopic.

    Both write their full stops, `։` and `።`, as the colon that keyboards have; a number or a quotation mark may
    stand before it.
    """
    index = end
    while index > first and data[index - 1] == _COLON:
        index -= 1
    if index == end:
        return False
    for _ in range(_NEAR):
        if index <= first:
            return False
        index = previous(data, index)
        code, _ = code_point(data, index)
        if _FIRST_ARMENIAN <= code <= _LAST_ARMENIAN or _FIRST_ETHIOPIC <= code <= _LAST_ETHIOPIC:
            return True
    return False


# characters between two full stops of a domain's name
_LONGEST_LABEL = 64
_LONGEST_TOP_LEVEL_DOMAIN = 63
# fewest and most
_PORT_DIGITS = (2, 5)

_DOT, _PLUS, _MINUS, _UNDERSCORE, _AT, _ASCII_COLON, _SLASH, _QUERY, _HASH = b".+-_@:/?#"


@compiled
def is_address(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> bool:
    """Whether it reads `scheme://user@name.of.host:80/and what follows`, of which only the host's name must be there."""
    if _is_host(data, start, end, classes):
        return True
    index = start
    while index < end:
        code, length = code_point(data, index)
        if not (classes[code] & (LETTER | DIGIT) or code in (_UNDERSCORE, _PLUS, _MINUS, _DOT)):
            break
        index += length
    has_scheme = index - start > 1 and index + 3 < end and data[index] == _ASCII_COLON
    if has_scheme and data[index + 1] == _SLASH and data[index + 2] == _SLASH and _is_host(data, index + 3, end, classes):
        return True
    follows_a_user = False
    for at in range(start + 1, end - 1):
        follows_a_user = follows_a_user or (data[at] == _AT and _is_host(data, at + 1, end, classes))
    return follows_a_user


@compiled
def _is_host(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> bool:
    """Whether labels with full stops between stand at `start`, the last of small letters, and then a port or a path."""
    labels = 0
    # of the label that is being read
    characters, begins_well, ends_well, is_top = 0, False, False, True
    index = start
    while index < end:
        code, length = code_point(data, index)
        if not classes[code] & HOST:
            break
        if code == _DOT:
            if not (begins_well and ends_well and characters <= _LONGEST_LABEL):
                return False
            labels += 1
            characters, begins_well, ends_well, is_top = 0, False, False, True
        else:
            ends_well = code not in (_MINUS, _UNDERSCORE)
            if not characters:
                begins_well = ends_well
            is_top &= classes[code] & LOWER != 0
            characters += 1
        index += length
    if not (labels and is_top and 2 <= characters <= _LONGEST_TOP_LEVEL_DOMAIN):
        return False
    if index < end and data[index] == _ASCII_COLON:
        port = index + 1
        while port < end and classes[data[port]] & DIGIT:
            port += 1
        if not _PORT_DIGITS[0] <= port - index - 1 <= _PORT_DIGITS[1]:
            return False
        index = port
    return index == end or data[index] == _SLASH or data[index] == _QUERY or data[index] == _HASH
