"""Attributes of start tags: the roles that their words stand for, links, and what hides an element."""

# ruff: noqa: SIM109, SIM110 - the compiler makes jumps of comparisons, and a tuple of `in`

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.vocabulary import fnv
from bessemer.data.text.compiled import compiled

FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_ROLE_START, _ITEMPROP_START, _ITEMTYPE_START = (np.uint64(fnv(word)) for word in ("role_", "itemprop_", "itemtype_"))
# Words of a `style` that hides its element.
_DISPLAY, _NONE, _VISIBILITY, _HIDDEN_VALUE = (
    np.frombuffer(word, np.uint8) for word in (b"display", b"none", b"visibility", b"hidden")
)
_WORD, _PREFIX, _WHOLE = 0, 1, 2
_NO_SEED = np.uint64(0)
# Bits of what a start tag's attributes say, other than roles.
HREF, UNSEEN, OG_TITLE, SELF_CLOSING = 1, 2, 4, 8


def _packed_attribute(name: str) -> int:
    """An attribute's name as the parser packs it: its first seven bytes and its length."""
    number = 0
    for byte in name.encode()[:7]:
        number = (number << 8) | byte
    return (number << 4) | min(len(name), 15)


_AT_CLASS, _AT_ID, _AT_ROLE, _AT_STYLE, _AT_HIDDEN, _AT_HREF = (
    _packed_attribute(n) for n in ("class", "id", "role", "style", "hidden", "href")
)
_AT_ITEMPROP, _AT_ITEMTYPE, _AT_ARIA_HIDDEN, _AT_PROPERTY, _AT_CONTENT, _AT_DATA_TESTID, _AT_DATA_COMPONENT = (
    _packed_attribute(n)
    for n in ("itemprop", "itemtype", "aria-hidden", "property", "content", "data-testid", "data-component")
)


@compiled
def is_space(byte: int) -> bool:
    """Whether a byte is ASCII white space."""
    return byte == 32 or (9 <= byte <= 13)


@compiled
def lower(byte: int) -> int:
    """A capital of ASCII as a small letter; any other byte as it is."""
    return byte + 32 if 65 <= byte <= 90 else byte


@compiled
def is_letter(byte: int) -> bool:
    """Whether a byte is a letter of ASCII."""
    return 65 <= byte <= 90 or 97 <= byte <= 122


@compiled
def look_up(keys: np.ndarray, bits: np.ndarray, state: np.uint64, way: int) -> int:
    """The bits that a hash stands for when it matches as a word, as a prefix or as the whole name."""
    mask = np.uint64(len(keys) - 1)
    slot = state & mask
    while keys[slot] != 0:
        if keys[slot] == state:
            return bits[slot, way]
        slot = (slot + np.uint64(1)) & mask
    return 0


@compiled
def attribute_roles(data: np.ndarray, start: int, end: int, seed: np.uint64, keys: np.ndarray, bits: np.ndarray) -> int:
    """The roles that the words in `data[start:end]` stand for; every byte is looked at once."""
    roles = 0
    word = seed
    joined = seed
    whole = seed
    length = 0
    lower_before: bool | np.bool_ = False
    for place in range(start, end + 1):
        byte = data[place] if place < end else np.uint8(32)
        upper = 65 <= byte <= 90
        letter = upper or 97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128
        if length and (not letter or (upper and lower_before)):
            roles |= look_up(keys, bits, word, _WORD) | look_up(keys, bits, joined, _WORD)
            joined = word
            word = seed
            length = 0
        if letter:
            low = np.uint64(lower(byte))
            word = (word ^ low) * FNV_PRIME
            joined = (joined ^ low) * FNV_PRIME
            whole = (whole ^ low) * FNV_PRIME
            length += 1
            if length >= 3:
                roles |= look_up(keys, bits, word, _PREFIX)
        elif is_space(byte):
            roles |= look_up(keys, bits, whole, _WHOLE)
            joined = seed
            whole = seed
        lower_before = 97 <= byte <= 122
    return roles


@compiled
def _is_word(data: np.ndarray, start: int, end: int, word: np.ndarray) -> bool:
    """Whether `data[start:end]` is `word`, in whatever case."""
    if end - start != len(word):
        return False
    for index in range(len(word)):
        if lower(data[start + index]) != word[index]:
            return False
    return True


@compiled
def _hides(data: np.ndarray, start: int, end: int) -> bool:
    """Whether a `style` takes the element off the page: a declaration `display: none` or `visibility: hidden`."""
    place = start
    while place < end:
        while place < end and (is_space(data[place]) or data[place] == 59):
            place += 1
        name = place
        while place < end and data[place] != 58 and data[place] != 59 and not is_space(data[place]):
            place += 1
        name_end = place
        while place < end and (data[place] == 58 or is_space(data[place])):
            place += 1
        value = place
        while place < end and is_letter(data[place]):
            place += 1
        if (_is_word(data, name, name_end, _DISPLAY) and _is_word(data, value, place, _NONE)) or (
            _is_word(data, name, name_end, _VISIBILITY) and _is_word(data, value, place, _HIDDEN_VALUE)
        ):
            return True
        while place < end and data[place] != 59:
            place += 1
    return False


@compiled
def read_attributes(
    data: np.ndarray, place: int, end: int, tag: int, keys: np.ndarray, bits: np.ndarray, value: np.ndarray
) -> tuple[int, int, int]:
    """Relevant attributes of a start tag: where the tag ends, the roles, and `HREF`, `UNSEEN`, … as bits.

    `value`, (2,), is set to where the `content` of a meta element lies.
    """
    role = 0
    marks = 0
    while place < end and data[place] != 62:
        byte = data[place]
        if byte == 47:
            if place + 1 < end and data[place + 1] == 62:
                marks |= SELF_CLOSING
            place += 1
            continue
        if is_space(byte):
            place += 1
            continue
        attribute = 0
        length = 0
        while place < end:
            byte = lower(data[place])
            if is_space(byte) or byte == 62 or byte == 47 or (byte == 61 and length):
                break
            if length < 7:
                attribute = (attribute << 8) | byte
            length += 1
            place += 1
        attribute = (attribute << 4) | min(length, 15)
        look = place
        while look < end and is_space(data[look]):
            look += 1
        start = stop = place
        if look < end and data[look] == 61:
            place = look + 1
            while place < end and is_space(data[place]):
                place += 1
            start = place
            if place < end and (data[place] == 34 or data[place] == 39):
                quote = data[place]
                place += 1
                start = place
                while place < end and data[place] != quote:
                    place += 1
                stop = place
                place += 1
            else:
                while place < end and data[place] != 62 and not is_space(data[place]):
                    place += 1
                stop = place
        elif look < end and data[look] != 62:
            place = look
        seed = _NO_SEED
        if attribute == _AT_CLASS or attribute == _AT_ID or attribute == _AT_DATA_TESTID or attribute == _AT_DATA_COMPONENT:
            seed = FNV_START
        elif attribute == _AT_ROLE:
            seed = _ROLE_START
        elif attribute == _AT_ITEMPROP:
            seed = _ITEMPROP_START
        elif attribute == _AT_ITEMTYPE:
            seed = _ITEMTYPE_START
        elif attribute == _AT_HREF:
            marks |= HREF
        # `aria-hidden` hides with a value that begins with t: true
        elif (
            attribute == _AT_HIDDEN
            or (attribute == _AT_STYLE and _hides(data, start, stop))
            or (attribute == _AT_ARIA_HIDDEN and stop > start and lower(data[start]) == 116)
        ):
            marks |= UNSEEN
        # `og:title`
        elif attribute == _AT_PROPERTY and stop - start == 8 and data[start + 3] == 116 and data[start + 4] == 105:
            marks |= OG_TITLE
        elif attribute == _AT_CONTENT:
            value[0], value[1] = start, stop
        if seed != _NO_SEED:
            role |= attribute_roles(data, start, stop, seed, keys, bits)
    return min(place + 1, end), role, marks
