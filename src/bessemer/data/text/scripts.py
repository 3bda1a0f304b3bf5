"""Scripts without spaces between words."""

from __future__ import annotations

from bessemer.data.text.compiled import compiled

#: Code points of such scripts, both ends included, ascending.
WITHOUT_SPACES = (
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
)
#: Tibetan has marks between syllables, and spaces between clauses alone.
_TIBETAN = (0x0F00, 0x0FFF)
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
