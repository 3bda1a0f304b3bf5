"""Scripts that put no space between words: apart from the compiled loops, so that a reader of them needs no Numba."""

import re

#: Their code points, both ends included, ascending.
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
_ALONE = "".join(f"{chr(first)}-{chr(last)}" for first, last in WITHOUT_SPACES)
#: A word as it is counted where texts are compared: a character of such a script is one by itself.
WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+")
#: Such a character.
ALONE = re.compile(f"[{_ALONE}]")
