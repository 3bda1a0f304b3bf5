"""PDF as Markdown with places: headings by the size of their letters, paragraphs, lists, code, tables, in the order of reading.

What pages repeat in their margins is left out, words that lines divide are put together, and paragraphs go on over columns and
pages. Each line's page and box are kept. Scanned pages without a layer of text are named.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from bessemer.core.environment import install_advice
from bessemer.retrieval.chunks import Box
from bessemer.retrieval.reading.markdown import Area, MarkdownWriter, Piece, ReadText, described_title, one_line
from bessemer.retrieval.reading.pdf_lines import Geometry, Line, geometry_of, lines_of_page
from bessemer.retrieval.reading.pdf_order import Table, as_tables, in_reading_order, without_running_lines
from bessemer.retrieval.reading.pdf_tables import TableFinder, has_rules

#: Most pages that are read, and the processor time for them.
_MOST_PAGES, _SECONDS = 20_000, 240.0
_BULLET = re.compile(r"(?:[•‣◦▪▫●○■□–—∙·\uf0b7\uf0a7\uf0d8-]|\(?(?:\d{1,3}|[a-z])[.)])[ \t]+(?=\S)")
_SIGN = re.compile(r"[•‣◦▪▫●○■□–—∙·\uf0b7\uf0a7\uf0d8-][ \t]+")
_WORD_CUT = re.compile(r"([^\W\d_]+)[-‐\xad]$")
_RANGE_CUT = re.compile(r"\d[-–]$")
_ADDRESS_CUT = re.compile(r"(?:https?://|www\.)\S*[/._-]$|\S+@$")
#: Chinese and Japanese, which have no blanks.
_WIDE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uff60]")
#: A heading's letters are so much larger than those of the text; it has at most so many characters and lines.
_LARGER, _LONGEST_HEADING, _HEADING_LINES = 1.1, 200, 3
#: A step from line to line that is so much longer than the usual one, and than the letters are high, begins a paragraph.
_LONGER_STEP, _LONGEST_STEP = 1.25, 1.4
#: The end of a line in a table of contents.
_LEADER = re.compile(r"(?:\.\s?|…\s?){4,}\s*\w+$")
_ENDS = (".", "!", "?", ":", ";", "…", "。", "！", "？", "”", '"', ")")


@dataclass
class _Page:
    """A page's lines and tables in the picture `frame`; `display` is the one that is shown."""

    number: int
    display: Geometry
    frame: Geometry
    lines: list[Line]
    tables: list[Table]

    def area(self, box: Box) -> Area:
        """A place on the page as it is shown."""
        return Area(self.number, self.frame.shown(box, self.display))


@dataclass
class _Paragraph:
    lines: list[Line]
    page: _Page

    @property
    def size(self) -> float:
        return max(self.lines, key=lambda line: len(line.text)).size

    @property
    def length(self) -> int:
        return sum(len(line.text) for line in self.lines)


def read_pdf(data: bytes, max_bytes: int) -> ReadText:
    """The text of a PDF. Raises pdfium's error for one that is damaged or needs a password; damaged pages are left out."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    try:
        writer = MarkdownWriter(max_bytes)
        title = described_title(document.get_metadata_dict().get("Title"))
        pages = _pages(document, data, writer.notes)
        heights = [page.frame.size[1] for page in pages]
        for page, lines in zip(pages, without_running_lines([page.lines for page in pages], heights), strict=True):
            page.lines = lines
        first_heading = _write(pages, writer)
        # a title on the first page is the outermost heading already
        return writer.finish("" if title.casefold() == first_heading.casefold() else title)
    finally:
        document.close()


def _pages(document: Any, data: bytes, notes: list[str]) -> list[_Page]:
    """All pages. What cannot be read is said in `notes`."""
    pages: list[_Page] = []
    scanned: list[int] = []
    damaged: list[int] = []
    is_without_tables = False
    finder: TableFinder | None = None
    started = time.process_time()
    for index in range(len(document)):
        if index >= _MOST_PAGES or time.process_time() - started > _SECONDS:
            notes.append(f"the pages after {index:,} were left out: there are too many")
            break
        try:
            page = document[index]
            try:
                display = geometry_of(page)
                lines, frame = lines_of_page(page, display)
                if not lines and _has_picture(page):
                    scanned.append(index + 1)
                # pdfplumber does not read text that stands askew
                wants_tables = len(lines) > 3 and frame == display and has_rules(page)
            finally:
                page.close()
        except Exception:  # pdfium's own, for a damaged page: the others may be whole
            damaged.append(index + 1)
            continue
        tables: list[Table] = []
        if wants_tables and not is_without_tables:
            try:
                finder = finder or TableFinder(data)
                tables, lines = finder.tables(index, lines, display, frame)
            except ImportError:
                is_without_tables = True
            except Exception:  # whatever pdfminer raises for a page that pdfium reads: its lines are there all the same
                tables = []
        pages.append(_Page(index + 1, display, frame, lines, tables))
    if finder is not None:
        finder.close()
    if scanned and len(scanned) < len(document):
        notes.append(f"no text on page {_numbers(scanned)}; scanned?")
    if damaged:
        notes.append(f"page {_numbers(damaged)} cannot be read")
    if is_without_tables:
        notes.append(f"its tables were read as lines: {install_advice('pdfplumber')}")
    return pages


def _has_picture(page: Any) -> bool:
    import pypdfium2.raw as pdfium

    return next(iter(page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE])), None) is not None


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _write(pages: Sequence[_Page], writer: MarkdownWriter) -> str:
    """Write the pages' text. Returns the first heading of the outermost level."""
    blocks = [block for page in pages for block in _blocks(page)]
    paragraphs = [block for block in blocks if isinstance(block, _Paragraph)]
    sizes: Counter[float] = Counter()
    bold = 0
    for paragraph in paragraphs:
        for line in paragraph.lines:
            sizes[_rounded(line.size)] += len(line.text)
            bold += len(line.text) if line.is_bold else 0
    if not sizes:
        return _write_blocks(blocks, {}, writer, set())
    usual = sizes.most_common(1)[0][0]
    bold_is_heading = bold < 0.4 * sizes.total()
    levels: dict[int, int] = {}
    heading_sizes = sorted({_rounded(one.size) for one in paragraphs if _is_large(one, usual)}, reverse=True)
    for paragraph in paragraphs:
        if _is_large(paragraph, usual):
            levels[id(paragraph)] = heading_sizes.index(_rounded(paragraph.size)) + 1
        elif bold_is_heading and _is_bold_heading(paragraph, usual):
            levels[id(paragraph)] = len(heading_sizes) + 1
    # names with a hyphen of their own
    compounds = {word.lower() for one in paragraphs for line in one.lines for word in re.findall(r"\w+(?:-\w+)+", line.text)}
    return _write_blocks(blocks, levels, writer, compounds)


def _rounded(size: float) -> float:
    return round(2 * size) / 2


def _is_large(paragraph: _Paragraph, usual: float) -> bool:
    return (
        paragraph.size >= _LARGER * usual
        and paragraph.length <= _LONGEST_HEADING
        and len(paragraph.lines) <= _HEADING_LINES
        and not any(line.is_fixed or line.cells or _LEADER.search(line.text) for line in paragraph.lines)
        and sum(map(str.isalpha, "".join(line.text for line in paragraph.lines))) >= 3
    )


def _is_bold_heading(paragraph: _Paragraph, usual: float) -> bool:
    text = paragraph.lines[-1].text
    return (
        all(line.is_bold and not line.is_fixed and not line.cells for line in paragraph.lines)
        and _LEADER.search(text) is None
        and len(paragraph.lines) <= 2
        and paragraph.length <= _LONGEST_HEADING / 2
        and paragraph.size >= 0.9 * usual
        and not text.endswith((".", ",", ";", ":"))
        and sum(map(str.isalpha, text)) >= 3
    )


def _blocks(page: _Page) -> Iterator[_Paragraph | tuple[Table, _Page]]:
    """The paragraphs and tables of a page in the order of reading."""
    for column in in_reading_order([*page.lines, *page.tables]):
        lines: list[Line] = []
        for item in as_tables(column):
            if isinstance(item, Table):
                yield from (_Paragraph(part, page) for part in _paragraphs(lines))
                lines = []
                yield item, page
            else:
                lines.append(item)
        yield from (_Paragraph(part, page) for part in _paragraphs(lines))


def _paragraphs(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines of a column as paragraphs."""
    if not lines:
        return
    left, right = min(line.box[0] for line in lines), max(line.box[2] for line in lines)
    steps = [after.base - before.base for before, after in pairwise(lines)
             if abs(after.size - before.size) < 0.5 and after.base - before.base < 2.2 * before.size]  # fmt: skip
    usual = median(steps) if steps else 1.3 * lines[0].size
    paragraph = [lines[0]]
    for line in lines[1:]:
        if _begins(paragraph, line, usual, left, right):
            yield paragraph
            paragraph = []
        paragraph.append(line)
    yield paragraph


def _begins(paragraph: Sequence[Line], line: Line, usual: float, left: float, right: float) -> bool:
    """Whether a line begins a paragraph. usual: the step from line to line; left, right: the borders of the column."""
    before, first = paragraph[-1], paragraph[0]
    if abs(line.size - before.size) > 0.08 * before.size or line.is_bold != before.is_bold or line.is_fixed != before.is_fixed:
        return True
    step = line.base - before.base
    if step > max(_LONGER_STEP * usual, _LONGEST_STEP * line.size) or step < 0:
        return True
    if line.is_fixed:
        return False
    if bool(line.cells) != bool(before.cells) or _BULLET.match(line.text) or _LEADER.search(before.text):
        return True
    if line.cells:
        return False
    size = line.size
    if abs(line.box[0] + line.box[2] - before.box[0] - before.box[2]) < 0.6 * size and abs(line.box[0] - before.box[0]) > size:
        # centred
        return False
    is_indented = line.box[0] > before.box[0] + 0.8 * size
    if is_indented and len(paragraph) == 1:
        # an item that hangs, or a new paragraph after one of a single line
        return not _BULLET.match(first.text) and (before.box[2] < right - 2 * size or before.text.endswith(_ENDS))
    if is_indented:
        return True
    hangs = len(paragraph) > 1 and before.box[0] > first.box[0] + 0.8 * size
    if hangs and line.box[0] <= first.box[0] + 0.5 * size:
        return True
    is_short = before.box[2] < right - max(4 * size, 0.2 * (right - left))
    return is_short and before.text.endswith(_ENDS) and not line.text[:1].islower()


def _write_blocks(
    blocks: Sequence[_Paragraph | tuple[Table, _Page]],
    levels: dict[int, int],
    writer: MarkdownWriter,
    compounds: set[str],
) -> str:
    first_heading = ""
    number = 0
    while number < len(blocks) and not writer.is_full:
        block = blocks[number]
        number += 1
        if isinstance(block, tuple):
            table, page = block
            writer.table(table.rows, [page.area(box) for box in table.boxes])
            continue
        if id(block) in levels:
            title = one_line("".join(piece.text for piece in _joined(block, compounds)))
            first_heading = first_heading or (title if levels[id(block)] == 1 else "")
            box = (min(line.box[0] for line in block.lines), block.lines[0].box[1],
                   max(line.box[2] for line in block.lines), block.lines[-1].box[3])  # fmt: skip
            writer.heading(levels[id(block)], title, block.page.area(box))
            continue
        if all(line.is_fixed for line in block.lines) and len(block.lines) > 1:
            writer.code(list(_code(block)))
            continue
        parts = [block]
        while number < len(blocks) and _goes_on(parts[-1], following := blocks[number], levels):
            assert isinstance(following, _Paragraph)
            parts.append(following)
            number += 1
        is_item = _SIGN.match(block.lines[0].text) is not None
        pieces = list(_joined(block, compounds))
        for before, part in pairwise(parts):
            pieces += _following(before, part, compounds, pieces)
        if is_item and pieces:
            pieces[0] = Piece(_SIGN.sub("- ", pieces[0].text, count=1), pieces[0].area)
        writer.paragraph(pieces)
    return first_heading


def _goes_on(before: _Paragraph, after: Any, levels: dict[int, int]) -> bool:
    """Whether a paragraph goes on in the next column or on the next page."""
    if not isinstance(after, _Paragraph) or id(after) in levels or id(before) in levels:
        return False
    last, first = before.lines[-1], after.lines[0]
    is_elsewhere = after.page is not before.page or first.base < last.base
    is_alike = abs(last.size - first.size) < 0.5 and not (last.is_fixed or first.is_fixed or last.cells or first.cells)
    if not is_elsewhere or not is_alike or _BULLET.match(first.text):
        return False
    return _WORD_CUT.search(last.text) is not None or (not last.text.endswith(_ENDS) and first.text[:1].islower())


def _joined(paragraph: _Paragraph, compounds: set[str]) -> Iterator[Piece]:
    """The lines of a paragraph with what stands between them; a divided word is one."""
    lines = paragraph.lines
    for number, line in enumerate(lines):
        following = lines[number + 1].text if number + 1 < len(lines) else None
        text, between = _ended(line.text, following, compounds)
        if following is not None and line.cells:
            text, between = line.text, "\n"
        yield Piece(text + between, paragraph.page.area(line.box))


def _following(before: _Paragraph, after: _Paragraph, compounds: set[str], pieces: list[Piece]) -> list[Piece]:
    """The pieces of a paragraph's next part; the last of `pieces` is changed to lead over to it."""
    text, between = _ended(before.lines[-1].text, after.lines[0].text, compounds)
    pieces[-1] = Piece(text + between, pieces[-1].area)
    return list(_joined(after, compounds))


def _ended(text: str, following: str | None, compounds: set[str]) -> tuple[str, str]:
    """A line's text, without the hyphen of a divided word, and what stands between it and the next line."""
    if following is not None and (
        (_RANGE_CUT.search(text) and following[:1].isdigit())
        or _ADDRESS_CUT.search(text)
        or (_WIDE.match(text[-1:]) and _WIDE.match(following[:1]))
    ):
        return text, ""
    cut = _WORD_CUT.search(text)
    if following is None or cut is None:
        return text.removesuffix("\xad") + ("-" if text.endswith("\xad") else ""), "" if following is None else " "
    rest = re.match(r"[^\W\d_]+", following)
    if rest is None or not following[:1].islower():
        # a compound, such as Jean-|Paul
        return text[:-1] + "-", ""
    start = re.search(r"[\w-]*$", text[:-1])
    whole = f"{start[0] if start else cut[1]}-{rest[0]}".lower()
    return (text[:-1] + "-", "") if whole in compounds else (text[:-1], "")


def _code(paragraph: _Paragraph) -> Iterator[Piece]:
    """The lines of code, indented by their distance from the left."""
    lines = paragraph.lines
    left = min(line.box[0] for line in lines)
    width = median(line.width / max(len(line.text), 1) for line in lines)
    for line in lines:
        indent = " " * round((line.box[0] - left) / width) if width > 0 else ""
        yield Piece(indent + line.text, paragraph.page.area(line.box))
