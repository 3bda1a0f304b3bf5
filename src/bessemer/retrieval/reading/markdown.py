"""Markdown with places: what the readers of office files write to, and what passages are cut from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bessemer.data.sources.source import encodable
from bessemer.retrieval.chunks import Box, Region

#: Characters without a shape: controls, the byte order mark, soft hyphens, what is no character.
_SHAPELESS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\xad\ufffe\uffff]")
#: What begins a heading, a code block or a table in Markdown.
_MARKUP = re.compile(r"#{1,6}(?:[ \t]|$)|`{3}|~{3}|\|.*\|$")


class Area(NamedTuple):
    """A place on a page, counted from 1. box: see `Box`; None: the page is known alone."""

    page: int
    box: Box | None = None


class Piece(NamedTuple):
    """A part of a paragraph, and its place."""

    text: str
    area: Area | None = None


@dataclass(frozen=True)
class ReadText:
    """The text of a file. regions: where its parts stand. notes: what was left out of it, one a line."""

    text: str
    regions: tuple[Region, ...] = ()
    title: str = ""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads."""
        return {"text": self.text, "regions": self.regions, "title": self.title, "notes": self.notes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ReadText:
        """Raises KeyError, TypeError or ValueError where the value is none of `as_json`."""
        regions = tuple(Region(start, end, page, tuple(box) if box else None) for start, end, page, box in value["regions"])
        return cls(str(value["text"]), regions, str(value["title"]), tuple(value["notes"]))


def one_line(text: str) -> str:
    """A text on one line, without characters that have no shape."""
    return encodable(" ".join(_SHAPELESS.sub("", text.replace("\xa0", " ").replace("\v", " ")).split()))


def described_title(title: str | None) -> str:
    """The title that a file states of itself; empty for the ones that programs put there."""
    title = one_line(title or "")
    is_made_up = (
        re.match(r"(?i)untitled|microsoft \w+ - |(?:powerpoint[ -])?presentation\d*$|word document|slide 1$", title) is not None
    )
    is_file = re.search(r"(?i)\.(docx?|pptx?|xlsx?|pdf|tex|dvi|indd|qxd|rtf|odt)$", title) is not None
    return "" if is_made_up or is_file or len(title) > 300 else title


class MarkdownWriter:
    """Writes blocks one after the other, until the text has `max_bytes`; further ones are left out."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[str] = []
        self._bytes = 0
        self._regions: list[Region] = []
        self.notes: list[str] = []

    @property
    def is_full(self) -> bool:
        """Whether no more is written."""
        return self._bytes >= self._max_bytes

    def heading(self, level: int, title: str, area: Area | None = None) -> None:
        """A heading of level 1 to 6, without text nothing."""
        if title := one_line(title):
            self._begin_block()
            self._write("#" * min(level, 6) + " ")
            self._write(title.rstrip("# ") or title, area)

    def paragraph(self, pieces: Iterable[Piece | str]) -> None:
        """Lines of a paragraph. A piece goes on where the one before ended: its text begins with the blank or the newline
        between them."""
        begun = False
        for piece in pieces:
            text, area = (piece, None) if isinstance(piece, str) else piece
            if not begun:
                text = text.lstrip()
                if not text:
                    continue
                begun = True
                self._begin_block()
                if _MARKUP.match(text):
                    self._write("\\")
            self._write(text, area)

    def code(self, lines: Sequence[Piece]) -> None:
        """A code block."""
        ticks = "`" * max([3, *(len(run) + 1 for line in lines for run in re.findall("`{3,}", line.text))])
        self._begin_block()
        self._write(ticks + "\n")
        for line in lines:
            self._write(encodable(_SHAPELESS.sub("", line.text)).rstrip() + "\n", line.area)
        self._write(ticks)

    def table(self, rows: Sequence[Sequence[str]], areas: Sequence[Area | None] = ()) -> None:
        """A table, its header first. Columns and rows without text are left out; what stands alone in the first column above
        the header is its title, a paragraph. areas: of the rows."""
        cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
        width = max(map(len, cells), default=0)
        used = [column for column in range(width) if any(column < len(row) and row[column] for row in cells)]
        kept = [number for number, row in enumerate(cells) if any(row)]
        if not used:
            return
        filled = {
            number: [column for column in used if column < len(cells[number]) and cells[number][column]] for number in kept
        }
        while filled[kept[0]] == used[:1] and any(len(filled[number]) > 1 for number in kept):
            title = kept.pop(0)
            self.paragraph([Piece(cells[title][used[0]], areas[title] if areas else None)])
        self._begin_block()
        for number in kept:
            row = cells[number]
            line = " | ".join(row[column] if column < len(row) else "" for column in used)
            self._write(("" if number == kept[0] else "\n") + f"| {line} |", areas[number] if areas else None)
            if number == kept[0]:
                self._write(f"\n{'|---' * len(used)}|")
            if self.is_full:
                return

    def finish(self, title: str = "") -> ReadText:
        """The text."""
        if self.is_full:
            self.notes.append(f"its text was cut after {self._bytes:,} bytes")
        return ReadText("".join(self._parts), tuple(self._regions), title, tuple(self.notes))

    def _begin_block(self) -> None:
        if self._parts:
            self._write("\n\n")

    def _write(self, text: str, area: Area | None = None) -> None:
        if self.is_full or not text:
            return
        start = self._bytes
        self._parts.append(text)
        self._bytes += len(text.encode())
        if area is not None:
            self._regions.append(Region(start, self._bytes, area.page, area.box))
