"""Edit `repair`: wrong encodings, control and invisible characters, line ends, broken words.

UTF-8 that was once taken for a single-byte encoding leaves pairs of characters that no language writes (`Ã©`, `â€™`,
`РџСЂ`). One regular expression looks for such pairs; only lines that have one go to ftfy, which undoes the mistake where
that gives sensible text. The other repairs are one pass over the bytes.
"""

from __future__ import annotations

import re

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.edits.registry import Repair
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts, strings

#: What windows-1252 shows for the bytes 80 to 9F.
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
#: A leading byte of UTF-8 and the one behind it, as Latin-1 or windows-1252, windows-1251, Mac OS Roman and IBM 437 show them.
_MOJIBAKE = (
    rf"[\x{{C2}}-\x{{F4}}][\x{{80}}-\x{{BF}}{_CP1252}]"
    r"|(?:[ГРСв][°±Ііґµ¶·№є»јЅѕїЂЃ‚ѓ„…†‡€‰‹ЊЌЏђ‘’“”•–—™љ›њќћџЎўЈ¤Ґ¦§©Є«¬®Ї]){2}"
    r"|[√¬][°-º©™´¨≠ÆØ∞±≤≥¥µ∂∑∏π∫ª]|‚Ä[ôúùìî¶]|[├┬][^\x00-\x7F\s]|Γ[ÇÉ]"
)
_MOJIBAKE_LINE = re.compile(
    _MOJIBAKE.replace(r"\x{C2}", "\xc2").replace(r"\x{F4}", "\xf4").replace(r"\x{80}", "\x80").replace(r"\x{BF}", "\xbf")
)
#: ftfy repairs encodings alone: its other repairs (quotes, ligatures, entities, width) change what an author wrote.
_ENCODING_ALONE = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
)
#: Letters, a hyphen that ends the line, and small letters: `trans-⏎formation`.
_BROKEN_WORD = r"(\p{L}{2})[-\x{2010}]\n[ \t]*(\p{Ll}{2})"


def repair(texts: Texts, settings: Repair | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts repaired, and how much of what was done in each.

    Line ends become newlines; vertical tabs, form feeds and Unicode's line and paragraph separators count as such. Joiners
    that scripts and emoji need (U+200C, U+200D) and plain direction marks (U+200E, U+200F) stay.
    """
    settings = settings or Repair()
    array, fixed_lines = _without_mojibake(texts.array) if settings.mojibake else (texts.array, None)
    batch = texts if array is texts.array else Texts.from_arrow(array)
    data, offsets, counts = _cleaned(batch.data, batch.offsets)
    if counts[:3].any():
        array = strings(data, offsets)
    joined = None
    if settings.join_broken_words:
        joined = pc.cast(pc.count_substring_regex(array, _BROKEN_WORD), pa.int64())
        array = pc.replace_substring_regex(array, _BROKEN_WORD, r"\1\2") if pc.any(pc.greater(joined, 0)).as_py() else array
    none = pa.array(np.zeros(len(texts), np.int64))
    return array, {
        "repair_mojibake_lines": none if fixed_lines is None else fixed_lines,
        "repair_control_characters": pa.array(counts[0]),
        "repair_invisible_characters": pa.array(counts[1]),
        "repair_line_ends": pa.array(counts[2]),
        "repair_joined_words": none if joined is None else joined,
        "repair_lost_characters": pa.array(counts[3]),
    }


def _without_mojibake(array: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The texts with lines put right, and how many lines of each; None where there was nothing to do."""
    suspect = np.asarray(pc.match_substring_regex(array, _MOJIBAKE))
    if not suspect.any():
        return array, None
    fixed_lines, changed = np.zeros(len(array), np.int64), {}
    for number in np.flatnonzero(suspect).tolist():
        lines = array[number].as_py().split("\n")
        fixed = [ftfy.fix_text_segment(line, _ENCODING_ALONE) if _MOJIBAKE_LINE.search(line) else line for line in lines]
        fixed_lines[number] = sum(before != behind for before, behind in zip(lines, fixed, strict=True))
        if fixed_lines[number]:
            changed[number] = "\n".join(fixed)
    if not changed:
        return array, None
    return pc.replace_with_mask(array, pa.array(fixed_lines > 0), pa.array(changed.values(), pa.string())), pa.array(
        fixed_lines
    )


@compiled_allocating
def _cleaned(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes without what does not belong in text, with newlines for line ends; counts (4, texts) of what was done."""
    texts = len(offsets) - 1
    out = np.empty(offsets[-1] - offsets[0], np.uint8)
    out_offsets = np.zeros(texts + 1, np.int64)
    counts = np.zeros((4, texts), np.int64)
    written = 0
    for text in range(texts):
        at, end = offsets[text], offsets[text + 1]
        while at < end:
            byte = data[at]
            if (
                (byte >= 0x20 and byte < 0x7F)
                or byte == 0x0A
                or byte == 0x09
                or (byte >= 0xC3 and byte != 0xE2 and byte != 0xEF)
            ):
                out[written] = byte
                written += 1
                at += 1
                continue
            width, what = _unwanted(data, at, end)
            if what in (_KEPT, _LOST):
                counts[3, text] += what == _LOST
                out[written : written + width] = data[at : at + width]
                written += width
            else:
                counts[what, text] += 1
                if what == _LINE_END:
                    out[written] = 0x0A
                    written += 1
            at += width
        out_offsets[text + 1] = written
    return out[:written], out_offsets, counts


_CONTROL, _INVISIBLE, _LINE_END, _LOST, _KEPT = 0, 1, 2, 3, 4


@compiled
def _unwanted(data: np.ndarray, at: int, end: int) -> tuple[int, int]:
    """The bytes of the character here (or of a carriage return with its newline), and what is to be done with it."""
    byte = data[at]
    if byte == 0x0D:
        return (2 if at + 1 < end and data[at + 1] == 0x0A else 1), _LINE_END
    if byte == 0x0B or byte == 0x0C:
        return 1, _LINE_END
    if byte < 0x20 or byte == 0x7F:
        return 1, _CONTROL
    if byte == 0xC2 and at + 1 < end:
        second = data[at + 1]
        if second == 0x85:
            return 2, _LINE_END
        return 2, _CONTROL if second < 0xA0 else _INVISIBLE if second == 0xAD else _KEPT
    if byte == 0xE2 and at + 2 < end:
        second, third = data[at + 1], data[at + 2]
        if second == 0x80:
            if third == 0xA8 or third == 0xA9:
                return 3, _LINE_END
            return 3, _INVISIBLE if third == 0x8B or 0xAA <= third <= 0xAE else _KEPT
        # the word joiner and the directional isolates
        return 3, _INVISIBLE if second == 0x81 and (third == 0xA0 or 0xA6 <= third <= 0xA9) else _KEPT
    if byte == 0xEF and at + 2 < end:
        second, third = data[at + 1], data[at + 2]
        if second == 0xBB and third == 0xBF:
            return 3, _INVISIBLE
        return 3, _LOST if second == 0xBF and third == 0xBD else _KEPT
    return 1, _KEPT
