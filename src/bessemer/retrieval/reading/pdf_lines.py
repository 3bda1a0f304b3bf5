"""Lines of a PDF's page from pdfium's characters: the text, box, size and style of each.

Characters come in the order of the file, which goes along each line, but not always from line to line. Here they become lines
without regard to columns; a gap in a line makes two of it. Text that stands at another angle than most of its page, such as a
stamp at its side, is left out.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bessemer.retrieval.chunks import Box
from bessemer.retrieval.reading.markdown import one_line

#: In parts of the font's size: what stands higher or lower is another line, the gap that divides a line, the gap that is a
#: blank between parts of a line, and the parts of a line above and below its base.
_SAME_LINE, _DIVIDING_GAP, _BLANK, _ASCENT, _DESCENT = 0.5, 1.5, 0.2, 0.8, 0.22
_BOLD = re.compile(r"(?i)bold|black|heavy|semibold|[-,]bd\b|medi\b")
_FIXED = re.compile(r"(?i)mono|courier|consol|typewriter|menlo|cmtt|sftt|lucidaconsole")
_FIXED_FLAG, _BOLD_FLAG, _BOLD_WEIGHT = 1, 1 << 18, 600
_NAME_BYTES = 128
#: pdfium's signs for a hyphen at the end of a line, and the soft hyphen.
HYPHENS = "\x02\ufffe\xad"


class Style(NamedTuple):
    """Of a run of characters. size: of the font in points as it is shown. turns: quarter turns, clockwise, that make the text
    upright; -1 for text that is askew."""

    size: float
    turns: int
    is_bold: bool
    is_fixed: bool


class Character(NamedTuple):
    """A character with its box and the origin of its glyph, in the page's own coordinates; a blank has no box."""

    text: str
    left: float = 0.0
    bottom: float = 0.0
    right: float = 0.0
    top: float = 0.0
    x: float = 0.0
    y: float = 0.0
    style: Style | None = None


@dataclass(frozen=True)
class Geometry:
    """From the coordinates of a PDF's page (y upwards) to those of its picture, turned clockwise: x to the right and y
    downwards from the upper left corner, in points. box: the visible part of the page: left, bottom, right, top."""

    box: tuple[float, float, float, float]
    turns: int

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the picture."""
        left, bottom, right, top = self.box
        return (right - left, top - bottom) if self.turns % 2 == 0 else (top - bottom, right - left)

    def point(self, x: float, y: float) -> tuple[float, float]:
        """A point of the page in its picture."""
        left, bottom, right, top = self.box
        if self.turns == 0:
            return x - left, top - y
        if self.turns == 1:
            return y - bottom, x - left
        if self.turns == 2:
            return right - x, y - bottom
        return top - y, right - x

    def page_point(self, u: float, v: float) -> tuple[float, float]:
        """A point of the picture on the page."""
        left, bottom, right, top = self.box
        if self.turns == 0:
            return left + u, top - v
        if self.turns == 1:
            return left + v, bottom + u
        if self.turns == 2:
            return right - u, bottom + v
        return right - v, top - u

    def shown(self, box: Box, other: Geometry) -> Box:
        """A box of this picture in another picture of the page, to tenths of a point."""
        points = [other.point(*self.page_point(*corner)) for corner in ((box[0], box[1]), (box[2], box[3]))]
        (u0, v0), (u1, v1) = points
        return round(min(u0, u1), 1), round(min(v0, v1), 1), round(max(u0, u1), 1), round(max(v0, v1), 1)


@dataclass
class Line:
    """A line, or what stands of it before a gap. box: in the picture in which the text is upright; base: of its letters."""

    text: str
    box: Box
    base: float
    size: float
    is_bold: bool = False
    is_fixed: bool = False
    #: Parts of a row that a gap divides, which belong to no columns of running text.
    cells: tuple[Line, ...] = ()

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]


def geometry_of(page: Any) -> Geometry:
    """How pdfium shows a page."""
    return Geometry(page.get_bbox(), page.get_rotation() // 90 % 4)


def lines_of_page(page: Any, display: Geometry) -> tuple[list[Line], Geometry]:
    """The lines of a page, from top to bottom, and the picture of the page in which they stand upright."""
    text_page = page.get_textpage()
    try:
        characters = list(_characters(text_page.raw))
    finally:
        text_page.close()
    turns = Counter(one.style.turns for one in characters if one.style is not None and one.style.turns >= 0)
    frame = Geometry(display.box, turns.most_common(1)[0][0] if turns else display.turns)
    lines = [line for run in _runs(characters, frame) if (line := run.line()) is not None]
    width, height = frame.size
    visible = [line for line in lines if line.box[0] < width and line.box[2] > 0 and line.box[1] < height and line.box[3] > 0]
    return _joined(visible), frame


def _characters(text_page: Any) -> Iterator[Character]:
    """The characters of a page in the order of the file. Blanks and ends of lines are characters without a style."""
    import pypdfium2.raw as pdfium

    left, right, bottom, top, x, y = (ctypes.c_double() for _ in range(6))
    box = tuple(map(ctypes.byref, (left, right, bottom, top)))
    origin = tuple(map(ctypes.byref, (x, y)))
    styles = _Styles(text_page)
    style: Style | None = None
    high = 0
    for index in range(pdfium.FPDFText_CountChars(text_page)):
        code = pdfium.FPDFText_GetUnicode(text_page, index)
        if 0xD800 <= code < 0xDC00:
            high = code
            continue
        if 0xDC00 <= code < 0xE000 and high:
            code, high = 0x10000 + (high - 0xD800 << 10) + code - 0xDC00, 0
        text = chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else ""
        if text in HYPHENS and text:
            yield Character("\xad")
            continue
        if not text or text.isspace() or code < 32:
            style = None
            yield Character(" ")
            continue
        if not pdfium.FPDFText_GetCharBox(text_page, index, *box) or not pdfium.FPDFText_GetCharOrigin(
            text_page, index, *origin
        ):
            continue
        style = style or styles.at(index)
        yield Character(text, left.value, bottom.value, right.value, top.value, x.value, y.value, style)


class _Styles:
    """Styles of characters, as pdfium tells them."""

    def __init__(self, text_page: Any) -> None:
        import pypdfium2.raw as pdfium

        self._pdfium = pdfium
        self._page = text_page
        self._matrix = pdfium.FS_MATRIX()
        self._name = ctypes.create_string_buffer(_NAME_BYTES)
        self._flags = ctypes.c_int()

    def at(self, index: int) -> Style:
        """The style of a character."""
        size = self._pdfium.FPDFText_GetFontSize(self._page, index)
        turns = 0
        if self._pdfium.FPDFText_GetMatrix(self._page, index, ctypes.byref(self._matrix)):
            size *= math.hypot(self._matrix.c, self._matrix.d)
            quarter = math.atan2(self._matrix.b, self._matrix.a) / (math.pi / 2)
            turns = round(quarter) % 4 if abs(quarter - round(quarter)) < 0.06 else -1
        self._flags.value = 0
        length = self._pdfium.FPDFText_GetFontInfo(self._page, index, self._name, _NAME_BYTES, ctypes.byref(self._flags))
        name = self._name.value.decode("utf-8", "replace") if 0 < length <= _NAME_BYTES else ""
        weight = self._pdfium.FPDFText_GetFontWeight(self._page, index)
        is_bold = bool(_BOLD.search(name)) or bool(self._flags.value & _BOLD_FLAG) or weight >= _BOLD_WEIGHT
        return Style(size or 1.0, turns, is_bold, bool(_FIXED.search(name)) or bool(self._flags.value & _FIXED_FLAG))


@dataclass
class _Run:
    """Characters that follow each other on a line."""

    base: float
    size: float
    parts: list[str] = field(default_factory=list)
    left: float = math.inf
    right: float = -math.inf
    #: Left side of the last character.
    last: float = math.inf
    #: Characters by their size, and of those bold and of fixed width.
    sizes: Counter[float] = field(default_factory=Counter)
    bold: int = 0
    fixed: int = 0

    def add(self, character: Character, left: float, right: float) -> None:
        assert character.style is not None
        self.parts.append(character.text)
        self.left, self.right, self.last = min(self.left, left), max(self.right, right), left
        self.sizes[round(character.style.size, 1)] += 1
        self.bold += character.style.is_bold
        self.fixed += character.style.is_fixed

    def line(self) -> Line | None:
        """The line; None for one of blanks."""
        text = "".join(self.parts)
        ends_cut = text.rstrip().endswith("\xad")
        text = one_line(text)
        if not text:
            return None
        size = self.sizes.most_common(1)[0][0]
        count = self.sizes.total()
        box = (self.left, self.base - _ASCENT * size, self.right, self.base + _DESCENT * size)
        # a hyphen that the font's text marks as one between lines
        return Line(text + "\xad" * ends_cut, box, self.base, size, self.bold > 0.8 * count, self.fixed > 0.8 * count)


def _runs(characters: Sequence[Character], frame: Geometry) -> Iterator[_Run]:
    """Runs of characters in a picture of the page. A new one begins where the next character is on another line, or far off."""
    run: _Run | None = None
    blank = False
    for character in characters:
        style = character.style
        if style is None:
            if character.text == "\xad":
                if run is not None:
                    run.parts.append("\xad")
            else:
                blank = True
            continue
        if style.turns != frame.turns:
            continue
        left, right = sorted((frame.point(character.left, character.bottom)[0], frame.point(character.right, character.top)[0]))
        _, base = frame.point(character.x, character.y)
        if run is None or not _goes_on(run, left, right, base, style.size, character.text):
            if run is not None:
                yield run
            run, blank = _Run(base, style.size), False
        elif style.size > 1.2 * run.size:
            # the base of a line is that of its large letters
            run.base, run.size = base, style.size
        if run.parts and blank:
            run.parts.append(" ")
        run.add(character, left, right)
        blank = False
    if run is not None:
        yield run


def _goes_on(run: _Run, left: float, right: float, base: float, size: float, text: str) -> bool:
    largest = max(size, run.size)
    if abs(base - run.base) > _SAME_LINE * largest:
        return False
    # parts of a ligature may all have the box of the whole
    if left >= run.last - 0.8 * largest and left - run.right <= _DIVIDING_GAP * largest:
        return True
    # from right to left
    return "\u0590" <= text <= "\u08ff" and -0.8 * largest <= run.left - right <= _DIVIDING_GAP * largest


def _joined(lines: list[Line]) -> list[Line]:
    """Lines from top to bottom, those put together that the file holds in parts: on one base, with no gap."""
    result: list[Line] = []
    for row in rows_of(lines):
        for line in row:
            before = result[-1] if result else None
            if (
                before is not None
                and line is not row[0]
                and abs(line.base - before.base) < 0.3 * before.size
                and -0.3 * before.size <= line.box[0] - before.box[2] <= 0.7 * before.size
                and 0.6 < line.size / before.size < 1.7
            ):
                blank = " " if line.box[0] - before.box[2] > _BLANK * before.size else ""
                box = (before.box[0], min(before.box[1], line.box[1]), line.box[2], max(before.box[3], line.box[3]))
                longer = line if len(line.text) > len(before.text) else before
                is_bold, is_fixed = before.is_bold and line.is_bold, before.is_fixed and line.is_fixed
                result[-1] = Line(before.text + blank + line.text, box, before.base, longer.size, is_bold, is_fixed)
            else:
                result.append(line)
    return result


def rows_of(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines by the rows in which they stand side by side: from top to bottom, each from left to right."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.base):
        if rows and line.base - rows[-1][0].base <= 0.35 * min(line.size, rows[-1][0].size):
            rows[-1].append(line)
        else:
            rows.append([line])
    return [sorted(row, key=lambda line: line.box[0]) for row in rows]
