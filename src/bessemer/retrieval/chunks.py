"""Documents cut into passages by their structure: headings, code blocks, tables, paragraphs, sentences.

A passage holds whole blocks as far as they fit. A block that is longer is cut between its sentences, or lines. Each passage
knows the headings above it and its place in the document, in bytes of UTF-8, so that what is quoted can be shown where it
stands. Neighbouring passages of a section share their last and first sentences (`overlap`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t]*#*$")
#: A line of `=` or `-` under a heading (setext).
_UNDERLINE = re.compile(r"^(=+|-{3,})[ \t]*$")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})")
_TABLE_ROW = re.compile(r"^[ \t]*\|.*\|[ \t]*$")
#: Where a sentence ends: after a mark, white space, and then anything but a small letter or a digit; or after a mark of Chinese
#: or Japanese.
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*[ \t\n]+(?![a-zß-öø-ÿ0-9])|(?<=[。！？｡])|\n+")


class Span(NamedTuple):
    """Characters `start` to `end` of a document."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Block:
    """A paragraph, a code block, a list or a table.

    headings: above it, the outermost first. is_whole: a code block or a table, which is cut between lines only.
    """

    span: Span
    headings: tuple[str, ...]
    is_whole: bool = False


@dataclass(frozen=True)
class Chunk:
    """A passage. start, end: bytes in the document's UTF-8. headings: the outermost first."""

    text: str
    start: int
    end: int
    headings: tuple[str, ...]


def cut_document(text: str, *, longest: int = 1000, overlap: int = 120) -> list[Chunk]:
    """Passages of at most `longest` characters, in order; neighbours share at most `overlap` characters of whole sentences.

    A sentence or a line that is longer than a passage is cut at a blank, or anywhere. Raises ValueError where `overlap` is not
    below half of `longest`.
    """
    if not 0 <= overlap < longest / 2:
        raise ValueError(f"overlap {overlap} must be below half of the longest passage, {longest}")
    chunks: list[Chunk] = []
    to_byte = _ByteOffsets(text)
    for headings, blocks in _sections(text):
        for span in _packed(text, blocks, longest, overlap):
            shown = text[span.start : span.end]
            start = span.start + len(shown) - len(shown.lstrip())
            end = span.end - len(shown) + len(shown.rstrip())
            if start < end:
                chunks.append(Chunk(text[start:end], to_byte(start), to_byte(end), headings))
    return chunks


def _sections(text: str) -> Iterator[tuple[tuple[str, ...], list[Block]]]:
    """Runs of blocks below the same headings."""
    section: list[Block] = []
    for block in blocks_of(text):
        if section and block.headings != section[0].headings:
            yield section[0].headings, section
            section = []
        section.append(block)
    if section:
        yield section[0].headings, section


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks of a text in order, headings left out."""
    headings: list[str] = []
    lines = list(_lines(text))
    number = 0
    while number < len(lines):
        line = text[lines[number].start : lines[number].end].rstrip("\n")
        if not line.strip():
            number += 1
        elif heading := _heading(text, lines, number):
            level, title, count = heading
            headings = [*headings[: level - 1], *[""] * (level - 1 - len(headings)), title]
            number += count
        else:
            count, is_whole = _block_lines(text, lines, number)
            span = Span(lines[number].start, lines[number + count - 1].end)
            yield Block(span, tuple(filter(None, headings)), is_whole)
            number += count


def _lines(text: str) -> Iterator[Span]:
    start = 0
    for line in text.splitlines(keepends=True):
        yield Span(start, start + len(line))
        start += len(line)


def _heading(text: str, lines: Sequence[Span], number: int) -> tuple[int, str, int] | None:
    """(level, title, number of lines) of a heading that begins at a line."""
    line = text[lines[number].start : lines[number].end].rstrip()
    if match := _HEADING.match(line):
        return len(match[1]), match[2], 1
    if number + 1 < len(lines) and line.strip() and not line.startswith((" ", "\t")):
        below = text[lines[number + 1].start : lines[number + 1].end].rstrip()
        before = text[lines[number - 1].start : lines[number - 1].end].strip() if number else ""
        if _UNDERLINE.match(below) and not before and len(line) <= 120:
            return (1 if below[0] == "=" else 2), line.strip(), 2
    return None


def _block_lines(text: str, lines: Sequence[Span], first: int) -> tuple[int, bool]:
    """The number of lines of the block that begins at a line, and whether it is code or a table."""

    def line(number: int) -> str:
        return text[lines[number].start : lines[number].end].rstrip("\n")

    if fence := _FENCE.match(line(first)):
        for number in range(first + 1, len(lines)):
            if line(number).strip().startswith(fence[1]) and not line(number).strip().strip(fence[1][0]):
                return number - first + 1, True
        return len(lines) - first, True
    kind = _TABLE_ROW.match(line(first)) is not None
    number = first + 1
    while number < len(lines) and line(number).strip():
        is_table = _TABLE_ROW.match(line(number)) is not None
        if is_table != kind or _FENCE.match(line(number)) or _heading(text, lines, number):
            break
        number += 1
    return number - first, kind


def _packed(text: str, blocks: Sequence[Block], longest: int, overlap: int) -> Iterator[Span]:
    """Spans of as many pieces as fit, each beginning with the last sentences of the one before."""
    pieces = [piece for block in blocks for piece in _pieces(text, block, longest)]
    first = 0
    while first < len(pieces):
        last = first
        while last + 1 < len(pieces) and pieces[last + 1].end - pieces[first].start <= longest:
            last += 1
        yield Span(pieces[first].start, pieces[last].end)
        if last + 1 == len(pieces):
            return
        following = last + 1
        while following > first + 1 and pieces[last].end - pieces[following - 1].start <= overlap:
            if pieces[last + 1].end - pieces[following - 1].start > longest:
                break
            following -= 1
        first = following


def _pieces(text: str, block: Block, longest: int) -> Iterator[Span]:
    """The pieces of a block that stay whole: code or a table itself, or its lines if it is too long; of other blocks the
    sentences."""
    if block.is_whole and len(block.span) <= longest:
        yield block.span
        return
    for piece in _lines_of(text, block.span) if block.is_whole else sentences(text, block.span):
        yield from _short(text, piece, longest)


def sentences(text: str, span: Span | None = None) -> Iterator[Span]:
    """The sentences of a text, or of a part of it, in order; together they cover it."""
    start, end = span or Span(0, len(text))
    for match in _SENTENCE.finditer(text, start, end):
        if match.end() > start:
            yield Span(start, match.end())
            start = match.end()
    if start < end:
        yield Span(start, end)


def _lines_of(text: str, span: Span) -> Iterator[Span]:
    for line in _lines(text[span.start : span.end]):
        yield Span(span.start + line.start, span.start + line.end)


def _short(text: str, span: Span, longest: int) -> Iterator[Span]:
    """A span cut into parts of at most `longest` characters, each after a blank if its second half has one."""
    start = span.start
    while span.end - start > longest:
        blank = max(
            text.rfind(" ", start + longest // 2, start + longest), text.rfind("\n", start + longest // 2, start + longest)
        )
        end = blank + 1 if blank >= 0 else start + longest
        yield Span(start, end)
        start = end
    yield Span(start, span.end)


class _ByteOffsets:
    """Byte offsets in UTF-8 of character offsets; fast for queries in rising order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._is_ascii = text.isascii()
        self._character, self._byte = 0, 0

    def __call__(self, character: int) -> int:
        if self._is_ascii:
            return character
        if character < self._character:
            self._byte -= len(self._text[character : self._character].encode())
        else:
            self._byte += len(self._text[self._character : character].encode())
        self._character = character
        return self._byte
