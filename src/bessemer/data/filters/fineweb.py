"""Scores `fineweb`: FineWeb's own measures (Penedo et al. 2024, section 3.5), which tell lists and navigation from prose."""

from __future__ import annotations

import pyarrow as pa

from bessemer.data.filters.measures import columns, ratio, repeated
from bessemer.data.text.lines import ENDS_IN_TERMINAL, IS_BLANK
from bessemer.data.text.texts import Texts

# characters
_SHORT_LINE = 30


def fineweb(texts: Texts) -> dict[str, pa.Array]:
    r"""The measures of each text, by column; zero for a blank text. Lines are those that are not blank.

    `punctuated_lines`: share of lines whose last character ends sentences. `short_lines`: of those of at most 30 characters.
    `duplicate_line_characters`: characters of lines equal to an earlier one ÷ characters but for `\n`. `newlines_per_word`:
    `\n` per word or mark.
    """
    lines = texts.lines
    present = lines.traits & IS_BLANK == 0
    number = lines.total(present)
    newlines = lines.counts - 1
    _, same_characters = repeated(lines, present)
    return columns(
        {
            "fineweb_punctuated_lines": ratio(lines.total(lines.traits & ENDS_IN_TERMINAL != 0), number),
            "fineweb_short_lines": ratio(lines.total(present & (lines.characters <= _SHORT_LINE)), number),
            "fineweb_duplicate_line_characters": ratio(same_characters, texts.characters - newlines),
            "fineweb_newlines_per_word": ratio(newlines, texts.words.counts),
        }
    )
