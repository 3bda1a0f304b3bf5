"""Spans of texts, and texts cut into lines and paragraphs, with their traits for filters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bessemer.data.text.characters import (
    LINE_BREAK,
    SPACE,
    TERMINAL,
    character_classes,
    code_point,
    is_colon_full_stop,
    previous,
    without_wordspace,
)
from bessemer.data.text.compiled import compiled, fnv_hash


@dataclass(frozen=True)
class Spans:
    """K spans of N texts, in order.

    Span k is `data[starts[k]:ends[k]]` of `Texts.data`, and `characters[k]` characters long; text n has the spans
    `of_text[n]` to `of_text[n + 1]`. starts, ends (K,) int64, of_text (N + 1,) int64, characters (K,) int32.
    """

    starts: np.ndarray
    ends: np.ndarray
    of_text: np.ndarray
    characters: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of spans of each text, (N,) int64."""
        return np.diff(self.of_text)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums by text, (N,) int64, of a number or a truth for each span."""
        sums = np.zeros(len(self) + 1, np.int64)
        np.cumsum(values, out=sums[1:])
        return sums[self.of_text[1:]] - sums[self.of_text[:-1]]


#: What is known of a line, as bits of `Lines.traits`.
#: white space alone, or nothing
IS_BLANK = 1 << 0
#: `•` or `-` is its first character that is no white space
BEGINS_WITH_BULLET = 1 << 1
#: `…` or `...` is what it ends in, white space left out
ENDS_IN_ELLIPSIS = 1 << 2
#: its very last character ends sentences
ENDS_IN_TERMINAL = 1 << 3

_LINE_FEED, _RETURN, _DOT, _MINUS, _BULLET, _ELLIPSIS = (ord(character) for character in "\n\r.-•…")
#: Bytes from here on up to 0x7F break no line.
_FIRST_PRINTED, _FIRST_BEYOND_ASCII = 0x20, 0x80


@dataclass(frozen=True)
class Lines(Spans):
    """Lines without their breaks, or paragraphs, of a batch of texts; what they look like is found out when it is asked for."""

    data: np.ndarray

    @cached_property
    def hashes(self) -> np.ndarray:
        """Hash of each line, (K,) uint64."""
        hashes = np.empty(len(self), np.uint64)
        _hash(self.data, self.starts, self.ends, hashes)
        return hashes

    @cached_property
    def traits(self) -> np.ndarray:
        """The bits above, (K,) uint8."""
        traits = np.empty(len(self), np.uint8)
        _describe(self.data, self.starts, self.ends, character_classes(), traits)
        return traits


class _Found(NamedTuple):
    starts: np.ndarray
    ends: np.ndarray
    characters: np.ndarray


def find_lines(data: np.ndarray, offsets: np.ndarray, *, unicode: bool) -> Lines:
    r"""The lines of each text: what `text.split("\n")` gives or, where `unicode`, what `text.splitlines()` gives."""
    return _spans_of(_cut_lines, data, offsets, unicode)


def find_paragraphs(data: np.ndarray, offsets: np.ndarray) -> Lines:
    """The text between empty lines, without white space around the whole; a blank text has no paragraph."""
    return _spans_of(_cut_paragraphs, data, offsets, False)


def _spans_of(cut: Callable[..., int], data: np.ndarray, offsets: np.ndarray, unicode: bool) -> Lines:
    # untouched pages of these arrays take no memory
    most = int(offsets[-1] - offsets[0]) + len(offsets)
    found = _Found(*(np.empty(most, kind) for kind in (np.int64, np.int64, np.int32)))
    of_text = np.zeros(len(offsets), np.int64)
    count = cut(data, offsets, character_classes(), unicode, found, of_text)
    starts, ends, characters = (column[:count] for column in found)
    return Lines(starts, ends, of_text, characters, data)


@compiled
def _cut_lines(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, unicode: bool, found: _Found, of_text: np.ndarray
) -> int:
    count = 0
    for text in range(len(offsets) - 1):
        start = index = offsets[text]
        end = offsets[text + 1]
        while index < end:
            if _FIRST_PRINTED <= data[index] < _FIRST_BEYOND_ASCII:
                index += 1
                continue
            code, length = code_point(data, index)
            index += length
            if code == _LINE_FEED or (unicode and classes[code] & LINE_BREAK):
                count = _write(data, start, index - length, found, count)
                if unicode and code == _RETURN and index < end and data[index] == _LINE_FEED:
                    index += 1
                start = index
        if start < end or not unicode:
            count = _write(data, start, end, found, count)
        of_text[text + 1] = count
    return count


@compiled
def _cut_paragraphs(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, unicode: bool, found: _Found, of_text: np.ndarray
) -> int:
    count = 0
    for text in range(len(offsets) - 1):
        start, end = stripped(data, offsets[text], offsets[text + 1], classes)
        index = start
        while index < end:
            if data[index] != _LINE_FEED:
                index += 1
                continue
            stop = index
            # this loop ends: the text was stripped, so its last character is no line break
            while data[index] == _LINE_FEED:
                index += 1
            if index - stop > 1:
                count = _write(data, start, stop, found, count)
                start = index
        if start < end:
            count = _write(data, start, end, found, count)
        of_text[text + 1] = count
    return count


@compiled
def stripped(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> tuple[int, int]:
    """The ends of `data[start:end]` without the white space around it."""
    while start < end:
        code, length = code_point(data, start)
        if not classes[code] & SPACE:
            break
        start += length
    while start < end:
        last = previous(data, end)
        if not classes[code_point(data, last)[0]] & SPACE:
            break
        end = last
    return start, end


@compiled
def _write(data: np.ndarray, start: int, end: int, found: _Found, count: int) -> int:
    found.starts[count] = start
    found.ends[count] = end
    found.characters[count] = characters_of(data, start, end)
    return count + 1


@compiled
def _hash(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, hashes: np.ndarray) -> None:
    for line in range(len(starts)):
        hashes[line] = fnv_hash(data, starts[line], ends[line])


@compiled
def _describe(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, classes: np.ndarray, traits: np.ndarray) -> None:
    for line in range(len(starts)):
        end, known = ends[line], 0
        first, stop = stripped(data, starts[line], end, classes)
        if first == stop:
            known |= IS_BLANK
        else:
            code, _ = code_point(data, first)
            if code in (_BULLET, _MINUS):
                known |= BEGINS_WITH_BULLET
            if code_point(data, previous(data, stop))[0] == _ELLIPSIS:
                known |= ENDS_IN_ELLIPSIS
            if stop - first > 2 and data[stop - 1] == _DOT and data[stop - 2] == _DOT and data[stop - 3] == _DOT:
                known |= ENDS_IN_ELLIPSIS
            end = without_wordspace(data, first, end)
            if classes[code_point(data, previous(data, end))[0]] & TERMINAL or is_colon_full_stop(data, first, end):
                known |= ENDS_IN_TERMINAL
        traits[line] = known


@compiled
def characters_of(data: np.ndarray, start: int, end: int) -> int:
    """The number of characters in `data[start:end]`."""
    count = 0
    for index in range(start, end):
        count += data[index] & 0xC0 != 0x80
    return count
