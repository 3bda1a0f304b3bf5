"""What scripts put between words and behind sentences in the place of a space and a full stop."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.compiled import compiled
from bessemer.data.text.script_ranges import WITHOUT_SPACES
from bessemer.data.text.utf8 import code_point, previous

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
