"""Edit `boilerplate`: removes lines of a page's furniture, and repetitions of a line.

A cookie notice or a copyright line is known by what it says and is short; buttons and links (`Share`, `Log in | Register`)
by having nothing else on the line. The lists are `word_lists/boilerplate.yaml`.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pyarrow as pa

from bessemer.data.edits.config import Boilerplate
from bessemer.data.edits.spans import Span, replaced
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.ascii import in_word, is_digit
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
    """Where each line begins, (lines + 1,), its newline within it, and the text that it belongs to, (lines,)."""
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
    """Which lines to drop so that of more than `repeats` equal ones in a row the first stays. Blank lines are no lines."""
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
