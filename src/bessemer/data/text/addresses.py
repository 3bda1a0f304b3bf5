"""Addresses of pages and people, each one word however many hyphens it has."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.characters import DIGIT, HOST, LETTER, LOWER
from bessemer.data.text.compiled import compiled
from bessemer.data.text.utf8 import code_point

# characters between two full stops of a domain's name
_LONGEST_LABEL = 64
_LONGEST_TOP_LEVEL_DOMAIN = 63
# fewest and most
_PORT_DIGITS = (2, 5)

_DOT, _PLUS, _MINUS, _UNDERSCORE, _AT, _COLON, _SLASH, _QUERY, _HASH = b".+-_@:/?#"


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
    has_scheme = index - start > 1 and index + 3 < end and data[index] == _COLON
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
    if index < end and data[index] == _COLON:
        port = index + 1
        while port < end and classes[data[port]] & DIGIT:
            port += 1
        if not _PORT_DIGITS[0] <= port - index - 1 <= _PORT_DIGITS[1]:
            return False
        index = port
    return index == end or data[index] == _SLASH or data[index] == _QUERY or data[index] == _HASH
