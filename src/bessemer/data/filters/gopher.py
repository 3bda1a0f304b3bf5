"""Gopher's quality measures (Rae et al. 2021, section A.1.1), as columns; `thresholds.GOPHER` holds its limits.

Words are runs of characters other than white space, as `str.split` gives them (the paper counts words; datatrove
counts a tokenizer's tokens, punctuation marks among them). Lines are those with something on them. Ratios are zero in
a text without words. Every measure is a count of pattern matches in Arrow's compiled kernels, so no loop over words
runs in Python.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

#: What Python calls white space, for use inside a character class: RE2's own `\s` is ASCII alone.
_SPACE_IN_LINE = r"\t\f\r\x0b\x1c-\x1f\x{85}\p{Z}"
_SPACE = rf"\n{_SPACE_IN_LINE}"
_ELLIPSIS = r"(?:\.\.\.|…)"
_WORD = f"[^{_SPACE}]+"
_WORD_FROM_ITS_FIRST_LETTER = rf"\p{{L}}[^{_SPACE}]*"
_LINE_FROM_ITS_FIRST_WORD = rf"[^{_SPACE}][^\n]*"
#: To the line's end: Arrow searches on behind each match as if a text began there, so that `^` would match again.
_BULLET_LINE = rf"(?m)^[{_SPACE}]*(?:[•‣][^\n]*|[-*][{_SPACE_IN_LINE}][^\n]*|[-*]$)"
_ELLIPSIS_LINE = rf"(?m){_ELLIPSIS}[{_SPACE}]*$"

COLUMNS = {
    name: pa.float64()
    for name in (
        "gopher_words",
        "gopher_mean_word_length",
        "gopher_hashes_per_word",
        "gopher_ellipses_per_word",
        "gopher_bullet_lines",
        "gopher_ellipsis_lines",
        "gopher_words_with_letter",
        "gopher_stop_words",
    )
}


def gopher_quality(texts: pa.Array) -> dict[str, pa.Array]:
    """The measures of each text, by column.

    `words` and `stop_words` (how many of the eight occur, in any case) are counts, `mean_word_length` is in
    characters, `hashes_per_word` and `ellipses_per_word` are occurrences of `#` and of `…` or `...` per word; the
    others are shares of lines (that begin with a bullet, that end in an ellipsis) and of words (with a letter).
    """
    words = _count(texts, _WORD)
    lines = _count(texts, _LINE_FROM_ITS_FIRST_WORD)
    characters = pc.subtract(pc.cast(pc.utf8_length(texts), pa.float64()), _count(texts, f"[{_SPACE}]"))
    present = (pc.match_substring_regex(texts, rf"\b{word}\b", ignore_case=True) for word in STOP_WORDS)
    return {
        "gopher_words": words,
        "gopher_mean_word_length": _ratio(characters, words),
        "gopher_hashes_per_word": _ratio(pc.cast(pc.count_substring(texts, "#"), pa.float64()), words),
        "gopher_ellipses_per_word": _ratio(_count(texts, _ELLIPSIS), words),
        "gopher_bullet_lines": _ratio(_count(texts, _BULLET_LINE), lines),
        "gopher_ellipsis_lines": _ratio(_count(texts, _ELLIPSIS_LINE), lines),
        "gopher_words_with_letter": _ratio(_count(texts, _WORD_FROM_ITS_FIRST_LETTER), words),
        "gopher_stop_words": _sum(pc.cast(found, pa.float64()) for found in present),
    }


def _count(texts: pa.Array, pattern: str) -> pa.Array:
    return pc.cast(pc.count_substring_regex(texts, pattern), pa.float64())


def _ratio(part: pa.Array, whole: pa.Array) -> pa.Array:
    empty = pc.equal(whole, 0.0)
    return pc.if_else(empty, 0.0, pc.divide(part, pc.if_else(empty, 1.0, whole)))


def _sum(columns: Iterable[pa.Array]) -> pa.Array:
    first, *others = columns
    for column in others:
        first = pc.add(first, column)
    return first
