"""Edits that remove lines: `boilerplate`, and C4's (Raffel et al. 2020, section 2.2), `c4_lines` and `c4_terminal_lines`.

`boilerplate`: a cookie notice or a copyright line is known by its words and is short; buttons and links (`Share`, `Log in |
Register`) have nothing else on the line (`word_lists/boilerplate.yaml`). A line equal to the one above it is a repetition.

C4's rules drop, in this order, lines (1) with a word of more than 1,000 characters; (2) without a mark that ends sentences or
a quotation mark at the end, or with `...` there: `c4_terminal_lines` alone, since FineWeb switches it off; (3) of fewer than
three words, such as blank lines; (4) with “javascript”; (5) with a phrase of policies and notices. Citation marks (`[1]`,
`[edit]`) are removed. A line with “lorem ipsum” or `{`, which condemns its document, stays for the score `c4`. Settings
(`C4Lines`) change the figures and switch off single rules.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pyarrow as pa

from bessemer.data.edits.registry import Boilerplate, C4Lines, edit_plugin
from bessemer.data.text.characters import (
    ETHIOPIC_WORDSPACE,
    SPACE,
    TERMINAL,
    character_classes,
    code_point,
    in_word,
    is_colon_full_stop,
    is_digit,
    is_without_spaces,
    previous,
    without_wordspace,
)
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.lines import stripped
from bessemer.data.text.texts import Span, Texts, replaced
from bessemer.data.word_lists.term_matcher import packaged_term_matcher

_SPACE, _NEWLINE = ord(" "), ord("\n")
#: First bytes of characters beyond ASCII that are mostly signs: `«`, `│`, `→`.
_SIGNS = (0xC2, 0xE2)
_WORD = re.compile(r"[^\W\d_]+")
_BETWEEN_LABELS = re.compile(r"[|·•,/»›>:()\t\[\]]|  +| [-–—] ")


def boilerplate(texts: Texts, settings: Boilerplate | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts without such lines, and how many were removed from each, by cause."""
    settings = settings or Boilerplate()
    starts, owners = _lines(texts.data, texts.offsets)
    matcher = packaged_term_matcher("boilerplate")
    _, hits = matcher.count_terms(texts.data, starts)
    notice, button = (hits[:, matcher.names.index(name)] for name in ("notices", "buttons"))
    furniture = np.zeros(len(owners), bool)
    if settings.notices:
        furniture |= (notice > 0) & (np.diff(starts) <= settings.longest_notice)
    if settings.buttons:
        for line in np.flatnonzero((button > 0) & (np.diff(starts) <= settings.longest_button)):
            furniture[line] |= _only_labels(texts.data[starts[line] : starts[line + 1]].tobytes().decode())
    repeated = _repeats(texts.data, starts, owners, settings.repeats) & ~furniture
    spans = [Span(int(starts[line]), int(starts[line + 1]), "line") for line in np.flatnonzero(furniture | repeated)]
    counts = {
        "boilerplate_lines": np.bincount(owners[furniture], minlength=len(texts)),
        "boilerplate_repeated_lines": np.bincount(owners[repeated], minlength=len(texts)),
    }
    return replaced(texts, spans, {"line": ""}), {name: pa.array(count.astype(np.int64)) for name, count in counts.items()}


@compiled_allocating
def _lines(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte of each line, (lines + 1,), newlines belonging to their lines, and the text of each line, (lines,)."""
    count = 1
    for text in range(len(offsets) - 1):
        begin = offsets[text]
        for at in range(begin, offsets[text + 1]):
            count += data[at] == _NEWLINE
        count += offsets[text + 1] > begin and data[offsets[text + 1] - 1] != _NEWLINE
    starts, owners = np.empty(count, np.int64), np.empty(count - 1, np.int64)
    line = 0
    for text in range(len(offsets) - 1):
        begin = offsets[text]
        for at in range(begin, offsets[text + 1]):
            if data[at] == _NEWLINE or at + 1 == offsets[text + 1]:
                starts[line], owners[line] = begin, text
                begin = at + 1
                line += 1
    starts[line] = offsets[-1]
    return starts, owners


@cache
def _labels() -> frozenset[str]:
    return frozenset(
        " ".join(re.findall(r"\w+", term.lower())) for term in packaged_term_matcher("boilerplate").categories["buttons"].terms
    )


def _only_labels(line: str) -> bool:
    """Whether a line is nothing but labels of buttons, apart by marks, tabs, wide gaps or their counts (`Share (12)`)."""
    parts = (" ".join(_WORD.findall(part.lower())) for part in _BETWEEN_LABELS.split(line))
    labels = [part for part in parts if part]
    return bool(labels) and all(label in _labels() for label in labels)


@compiled_allocating
def _repeats(data: np.ndarray, starts: np.ndarray, owners: np.ndarray, repeats: int) -> np.ndarray:
    """The lines to drop, so that of more than `repeats` equal ones in a row the first stays; blank lines do not count."""
    lines = len(owners)
    dropped = np.zeros(lines, np.bool_)
    at = 0
    while at < lines:
        first, behind = _trimmed(data, starts[at], starts[at + 1])
        run = at + 1
        while run < lines and owners[run] == owners[at] and behind > first:
            other_first, other_behind = _trimmed(data, starts[run], starts[run + 1])
            if other_behind - other_first != behind - first:
                break
            equal = True
            for place in range(behind - first):
                if data[first + place] != data[other_first + place]:
                    equal = False
                    break
            if not equal:
                break
            run += 1
        if run - at > repeats and _prose(data, first, behind):
            dropped[at + 1 : run] = True
        at = run
    return dropped


@compiled
def _prose(data: np.ndarray, first: int, behind: int) -> bool:
    """Whether a line says something in words: in tables, figures and code equal lines in a row have their place."""
    while first < behind and data[first] <= _SPACE:
        first += 1
    letters = 0
    for at in range(first, behind):
        letters += in_word(data[at]) and not is_digit(data[at])
    begins = first < behind and in_word(data[first]) and not is_digit(data[first]) and data[first] not in _SIGNS
    return bool(begins and letters >= 12 and 10 * letters >= 7 * (behind - first))


@compiled
def _trimmed(data: np.ndarray, first: int, behind: int) -> tuple[int, int]:
    """A line without its newline and the blanks at its end; its indentation belongs to it unless nothing follows."""
    while behind > first and data[behind - 1] <= _SPACE:
        behind -= 1
    return first, behind


#: Columns of counts: one a rule, in the order of the rules, then the citations.
_COLUMNS = tuple(edit_plugin("c4_lines").columns)

_KEPT = -1
_LONG_WORD, _UNTERMINATED, _FEW_WORDS, _JAVASCRIPT, _POLICY, _CITATIONS = range(6)

_PHRASES = (
    b"lorem ipsum",
    b"javascript",
    b"terms of use",
    b"privacy policy",
    b"cookie policy",
    b"uses cookies",
    b"use of cookies",
    b"use cookies",
)
_HAS_LOREM_IPSUM, _HAS_JAVASCRIPT = 1 << 0, 1 << 1

_OPEN, _CLOSE, _BRACE, _DOT, _ZERO, _NINE = b"[]{.09"
_TERMINALS = tuple(b".?!\"'")
#: Quotation marks behind a sentence. “, « and ‘ are such too: in German, Danish and Czech.
_CLOSING_QUOTES = tuple(map(ord, "”“’‘»«›」』"))
_UPPER_A, _UPPER_Z, _CASE = ord("A"), ord("Z"), 0x20
_EDIT, _CITATION_NEEDED = np.frombuffer(b"edit]", np.uint8), np.frombuffer(b"citation needed]", np.uint8)


def c4_lines(texts: Texts, settings: C4Lines | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts without the lines that the rules 1, 3, 4 and 5 drop, and how many each dropped; blank lines uncounted."""
    return _edited(texts, settings or C4Lines(), terminal_punctuation=False)


def c4_terminal_lines(texts: Texts, settings: C4Lines | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """As `c4_lines`, with rule 2, as in C4 itself."""
    return _edited(texts, settings or C4Lines(), terminal_punctuation=True)


def _edited(texts: Texts, settings: C4Lines, *, terminal_punctuation: bool) -> tuple[pa.Array, dict[str, pa.Array]]:
    lines = texts.unicode_lines
    written = np.empty(int(texts.offsets[-1] - texts.offsets[0]), np.uint8)
    ends, counts = np.zeros(len(texts) + 1, np.int32), np.zeros((len(texts), len(_COLUMNS)), np.int64)
    _edit(
        texts.data,
        texts.offsets,
        (lines.starts, lines.ends, lines.of_text),
        character_classes(),
        _phrases(),
        (
            settings.longest_word,
            settings.fewest_words,
            terminal_punctuation,
            settings.every_script,
            settings.javascript,
            settings.policy,
        ),
        settings.citations,
        written,
        ends,
        counts,
    )
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(written[: ends[-1]])]
    array = pa.Array.from_buffers(pa.string(), len(texts), buffers)
    return array, {name: pa.array(counts[:, number]) for number, name in enumerate(_COLUMNS)}


@cache
def _phrases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The phrases' bytes, where each begins, and by which bytes one begins, (256,) bool."""
    begins = np.zeros(256, np.bool_)
    begins[[phrase[0] for phrase in _PHRASES]] = True
    return np.frombuffer(b"".join(_PHRASES), np.uint8), np.cumsum([0, *map(len, _PHRASES)]), begins


@compiled
def _edit(
    data: np.ndarray,
    offsets: np.ndarray,
    lines: tuple[np.ndarray, np.ndarray, np.ndarray],
    classes: np.ndarray,
    phrases: tuple[np.ndarray, np.ndarray, np.ndarray],
    rules: tuple[int, int, bool, bool, bool, bool],
    citations: bool,
    written: np.ndarray,
    ends: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Write the texts to `written`, where each ends to `ends`, and what was dropped to `counts`."""
    starts, stops, of_text = lines
    index = 0
    for text in range(len(offsets) - 1):
        # end of the last kept line, without its line break
        content = index
        dropped_last = False
        for line in range(of_text[text], of_text[text + 1]):
            start, end = stripped(data, starts[line], stops[line], classes)
            rule = _judge(data, start, end, classes, phrases, rules)
            dropped_last = rule != _KEPT
            if dropped_last:
                if start < end:
                    counts[text, rule] += 1
                continue
            at = starts[line]
            while at < stops[line]:
                citation = _citation(data, at, stops[line]) if citations else 0
                if citation:
                    counts[text, _CITATIONS] += 1
                    at += citation
                else:
                    written[index] = data[at]
                    index += 1
                    at += 1
            content = index
            next_start = starts[line + 1] if line + 1 < of_text[text + 1] else offsets[text + 1]
            for at in range(stops[line], next_start):
                written[index] = data[at]
                index += 1
        if dropped_last:
            index = content
        ends[text + 1] = index


@compiled
def _judge(
    data: np.ndarray,
    start: int,
    end: int,
    classes: np.ndarray,
    phrases: tuple[np.ndarray, np.ndarray, np.ndarray],
    rules: tuple[int, int, bool, bool, bool, bool],
) -> int:
    """The rule that drops a line without white space around it, or `_KEPT`."""
    longest_word, fewest_words, terminal_punctuation, every_script, javascript, policy = rules
    words, longest, is_spaced = _words(data, start, end, classes)
    if is_spaced or every_script:
        if longest > longest_word:
            return _LONG_WORD
        if terminal_punctuation and not _is_terminated(data, start, end, classes, every_script):
            return _UNTERMINATED
        if words < fewest_words:
            return _FEW_WORDS
    phrases_seen, has_brace = _find_phrases(data, start, end, phrases)
    if phrases_seen & _HAS_LOREM_IPSUM:
        return _KEPT
    if javascript and phrases_seen & _HAS_JAVASCRIPT:
        return _JAVASCRIPT
    return _POLICY if policy and phrases_seen & ~_HAS_JAVASCRIPT and not has_brace else _KEPT


@compiled
def _words(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> tuple[int, int, bool]:
    """Words by white space, characters of the longest, and whether the line's script puts spaces between words."""
    words, longest, characters, total, unspaced = 0, 0, 0, 0, 0
    index = start
    while index < end:
        code, length = code_point(data, index)
        if classes[code] & SPACE or code == ETHIOPIC_WORDSPACE:
            characters = 0
        else:
            words += characters == 0
            characters += 1
            longest = max(longest, characters)
            total += 1
            unspaced += is_without_spaces(code)
        index += length
    return words, longest, 2 * unspaced < total or unspaced == 0


@compiled
def _is_terminated(data: np.ndarray, start: int, end: int, classes: np.ndarray, as_the_peer: bool) -> bool:
    """Whether a line ends as a sentence does, citations behind it left out; as_the_peer: in a mark of `_TERMINALS`."""
    # one past the last byte that belongs to no citation
    stop, at = start, start
    while at < end:
        citation = _citation(data, at, end)
        if citation:
            at += citation
        else:
            at += 1
            stop = at
    stop = without_wordspace(data, start, stop)
    if stop == start:
        return False
    if data[stop - 1] not in _TERMINALS:
        code, _ = code_point(data, previous(data, stop))
        if as_the_peer or not (classes[code] & TERMINAL or _is_closing_quote(code) or is_colon_full_stop(data, start, stop)):
            return False
    return not (stop - start > 2 and data[stop - 1] == _DOT and data[stop - 2] == _DOT and data[stop - 3] == _DOT)


@compiled
def _is_closing_quote(code: int) -> bool:
    return code in _CLOSING_QUOTES


@compiled
def _citation(data: np.ndarray, start: int, end: int) -> int:
    """Bytes of a mark of citation that begins at `start`; zero where none does."""
    if data[start] != _OPEN:
        return 0
    index = start + 1
    while index < end and _ZERO <= data[index] <= _NINE:
        index += 1
    if index < end and data[index] == _CLOSE:
        return index + 1 - start
    for literal in (_EDIT, _CITATION_NEEDED):
        length = 1 + len(literal)
        if start + length <= end and _equal(data, start + 1, literal, 0, len(literal)):
            return length
    return 0


@compiled
def _equal(data: np.ndarray, start: int, other: np.ndarray, first: int, last: int) -> bool:
    """Whether `other[first:last]` stands at `start`, capital letters of ASCII taken for small ones."""
    for index in range(first, last):
        byte = data[start + index - first]
        if _UPPER_A <= byte <= _UPPER_Z:
            byte |= _CASE
        if byte != other[index]:
            return False
    return True


@compiled
def _find_phrases(
    data: np.ndarray, start: int, end: int, phrases: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[int, bool]:
    """The phrases in a line, as bits, and whether it has a curly bracket."""
    spelt, begins, begin_bytes = phrases
    seen, has_brace = 0, False
    for index in range(start, end):
        byte = data[index]
        has_brace |= byte == _BRACE
        if not begin_bytes[byte | _CASE]:
            continue
        for number in range(len(begins) - 1):
            length = begins[number + 1] - begins[number]
            if index + length <= end and _equal(data, index, spelt, begins[number], begins[number + 1]):
                seen |= 1 << number
    return seen, has_brace
