"""Documents cut into passages by their structure: headings, code blocks, tables, paragraphs, sentences.

A passage holds whole blocks as far as they fit. A block that is longer is cut between its sentences, or lines. Each passage
knows the headings above it and its place in the document, in bytes of UTF-8, so that what is quoted can be shown where it
stands. Neighbouring passages of a section share their last and first sentences (`overlap`). A passage that begins inside a
table has the table's header besides, which is no part of its text. Regions say on which page, and where on it, bytes of a
document stand in the file that it was read from.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t]*#*$")
#: A line of `=` or `-` under a heading (setext).
_UNDERLINE = re.compile(r"^(=+|-{3,})[ \t]*$")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})")
_TABLE_ROW = re.compile(r"^[ \t]*\|.*\|[ \t]*$")
#: The line below a table's header.
_TABLE_RULE = re.compile(r"^[ \t]*\|(?:[ \t]*:?-+:?[ \t]*\|)+[ \t]*$")
#: Where a sentence ends: after a mark, white space, and then anything but a small letter or a digit; or after a mark of
#: Chinese, Japanese, Hindi and its kin, Arabic, Urdu, Armenian, Ethiopic, Burmese or Khmer.
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*[ \t\n]+(?![a-zß-öø-ÿ0-9])|(?<=[。！？｡।॥؟۔։።။។])|\n+")


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


#: Left, top, right and bottom in points (1/72 inch) from the upper left corner of a page as it is shown.
Box = tuple[float, float, float, float]


class Region(NamedTuple):
    """Bytes `start` to `end` of a document's UTF-8, and their place in the file: the page, or slide, from 1, and the box around
    them; None where it is not known."""

    start: int
    end: int
    page: int
    box: Box | None = None


def place_of(regions: Sequence[Region], start: int, end: int) -> tuple[int | None, Box | None]:
    """The page on which the bytes `start` to `end` begin, and the box around those of them that stand on it. regions: in order,
    without overlaps."""
    page: int | None = None
    box: Box | None = None
    for number in range(bisect_right(regions, start, key=lambda region: region.end), len(regions)):
        region = regions[number]
        if region.start >= end or (page is not None and region.page != page):
            break
        page = region.page
        box = united(box, region.box)
    return page, box


def united(first: Box | None, second: Box | None) -> Box | None:
    """The smallest box around two."""
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), min(first[1], second[1]), max(first[2], second[2]), max(first[3], second[3])


@dataclass(frozen=True)
class Chunk:
    """A passage. start, end: bytes in the document's UTF-8. headings: the outermost first. table_header: of the table inside
    which the text begins."""

    text: str
    start: int
    end: int
    headings: tuple[str, ...]
    table_header: str = ""


class _Piece(NamedTuple):
    """What stays whole, and the header of the table that it is a row of."""

    span: Span
    table_header: str = ""

    @property
    def header_length(self) -> int:
        return len(self.table_header) + 1 if self.table_header else 0


def cut_document(text: str, *, longest: int = 1000, overlap: int = 120) -> list[Chunk]:
    """Passages of at most `longest` characters, with a table's repeated header, in order; neighbours share at most `overlap`
    characters of whole sentences.

    A sentence or a line that is longer than a passage is cut at a blank, or anywhere. Raises ValueError where `overlap` is not
    below half of `longest`.
    """
    if not 0 <= overlap < longest / 2:
        raise ValueError(f"overlap {overlap} must be below half of the longest passage, {longest}")
    chunks: list[Chunk] = []
    to_byte = _ByteOffsets(text)
    for headings, blocks in _sections(text):
        for span, table_header in _packed(text, blocks, longest, overlap):
            shown = text[span.start : span.end]
            start = span.start + len(shown) - len(shown.lstrip())
            end = span.end - len(shown) + len(shown.rstrip())
            if start < end:
                chunks.append(Chunk(text[start:end], to_byte(start), to_byte(end), headings, table_header))
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


def _packed(text: str, blocks: Sequence[Block], longest: int, overlap: int) -> Iterator[_Piece]:
    """As many pieces together as fit, each time beginning with the last sentences of the ones before."""
    pieces = [piece for block in blocks for piece in _pieces(text, block, longest)]
    first = 0
    while first < len(pieces):
        start, room = pieces[first].span.start, longest - pieces[first].header_length
        last = first
        while last + 1 < len(pieces) and pieces[last + 1].span.end - start <= room:
            last += 1
        yield _Piece(Span(start, pieces[last].span.end), pieces[first].table_header)
        if last + 1 == len(pieces):
            return
        following = last + 1
        while following > first + 1:
            before = pieces[following - 1]
            if pieces[last].span.end - before.span.start > overlap:
                break
            if pieces[last + 1].span.end - before.span.start > longest - before.header_length:
                break
            following -= 1
        first = following


def _pieces(text: str, block: Block, longest: int) -> Iterator[_Piece]:
    """The pieces of a block that stay whole: code or a table itself, or its lines if it is too long; of other blocks the
    sentences."""
    if block.is_whole and len(block.span) <= longest:
        yield _Piece(block.span)
        return
    header, below = _table_header(text, block, longest // 2) if block.is_whole else ("", block.span.end)
    for line in _lines_of(text, block.span) if block.is_whole else sentences(text, block.span):
        own = header if line.start >= below else ""
        for part in _short(text, line, longest - (len(own) + 1 if own else 0)):
            yield _Piece(part, own)


def _table_header(text: str, block: Block, most: int) -> tuple[str, int]:
    """The header of a table with the line below it, and where they end. A header of more than `most` characters loses its last
    columns. Empty for code, and for a table without a header."""
    lines = list(_lines_of(text, block.span))[:2]
    shown = [text[line.start : line.end].strip() for line in lines]
    if len(shown) < 2 or not _TABLE_ROW.match(shown[0]) or not _TABLE_RULE.match(shown[1]):
        return "", block.span.end
    if len(header := "\n".join(shown)) > most:
        columns: list[str] = []
        for cell in re.split(r"(?<!\\)\|", shown[0].strip("|")):
            if sum(len(column) + 5 for column in columns) + len(cell) + 8 > most:
                break
            columns.append(cell)
        header = f"|{'|'.join(columns)}|\n{'|---' * len(columns)}|" if columns else ""
    return header, lines[1].end


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
