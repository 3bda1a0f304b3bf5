"""DOCX as Markdown: headings, lists, tables, footnotes.

The document's XML is walked, since `python-docx` gives no text of content controls, inserted text and footnotes. What readers
of the document do not see is left out: deleted and hidden text, comments, the headers and footers of pages, tables of contents.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from bessemer.data.sources.markup import children, local_name, parse_xml
from bessemer.retrieval.reading.markdown import MarkdownWriter, Piece, ReadText, described_title, one_line

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
#: Elements whose text is not part of the paragraph that they stand in.
_SKIPPED = frozenset({"pPr", "rPr", "del", "moveFrom", "delText", "instrText", "Fallback", "sdtPr", "commentReference"})
_WRAPPERS = frozenset({"customXml", "ins", "moveTo", "smartTag", "sdtContent"})
_HEADING_STYLE = re.compile(r"heading ([1-9])$")


class _Style(NamedTuple):
    """A paragraph style with what it has from those it is based on."""

    name: str
    level: int | None
    list_id: str | None
    list_level: int


def read_docx(data: bytes, max_bytes: int) -> ReadText:
    """The text of a document. Raises ValueError for what is none, and what `python-docx` raises for a damaged one."""
    import docx

    try:
        document = docx.Document(io.BytesIO(data))
    except ValueError:
        # its text names an object in memory
        raise ValueError("its content is no Word document, or one of another suffix") from None
    reader = _Reader(document, MarkdownWriter(max_bytes))
    reader.write(document.element.body)
    title = reader.title or described_title(document.core_properties.title)
    return reader.writer.finish(title)


class _Reader:
    def __init__(self, document: Any, writer: MarkdownWriter) -> None:
        self.writer = writer
        self.title = ""
        parts = {
            relation.reltype.rpartition("/")[2]: relation.target_part
            for relation in document.part.rels.values()
            if not relation.is_external
        }
        self._styles = _styles(_root(parts.get("styles")))
        self._formats = _list_formats(_root(parts.get("numbering")))
        self._notes = {
            kind: {note.get(f"{_W}id"): note for note in children(root, kind)}
            for kind in ("footnote", "endnote")
            if (root := _root(parts.get(f"{kind}s"))) is not None
        }
        self._note_count = 0
        #: Numbers of the open lists, by their id and level.
        self._numbers: dict[tuple[str, int], int] = {}
        #: The items of the list that is being read.
        self._items: list[str] = []
        #: Texts of boxes that stand beside the paragraph that is being read.
        self._boxes: list[Any] = []

    def write(self, parent: Any) -> None:
        """The blocks in an element, in order."""
        self._write_blocks(parent)
        self._end_list()

    def _write_blocks(self, parent: Any) -> None:
        for child in parent:
            if self.writer.is_full:
                return
            name = local_name(child)
            if name == "p":
                self._paragraph(child)
            elif name == "tbl":
                self._table(child)
            elif name in _WRAPPERS or (name == "sdt" and not _is_contents(child)):
                self._write_blocks(child)

    def _paragraph(self, paragraph: Any) -> None:
        style = self._style_of(paragraph)
        text, notes = self._text(paragraph)
        boxes, self._boxes = self._boxes, []
        if text and not style.name.startswith(("toc ", "table of figures")):
            if style.name == "title" and not self.title:
                self.title = one_line(text)
            elif style.level is not None:
                self._end_list()
                self.writer.heading(style.level, text)
            elif style.list_id is not None:
                self._items.append(self._marker(style) + one_line(text))
            else:
                self._end_list()
                lines = [line for part in text.split("\n") if (line := one_line(part))]
                self.writer.paragraph(Piece(("\n" if number else "") + line) for number, line in enumerate(lines + notes))
                notes = []
            if notes:
                self._end_list()
                self.writer.paragraph(Piece(("\n" if number else "") + note) for number, note in enumerate(notes))
        for box in boxes:
            self._write_blocks(box)

    def _end_list(self) -> None:
        if self._items:
            self.writer.paragraph(Piece(("\n" if number else "") + item) for number, item in enumerate(self._items))
            self._items = []

    def _marker(self, style: _Style) -> str:
        """The sign before an item of a list: its number, or a dash."""
        assert style.list_id is not None
        key = (style.list_id, style.list_level)
        for other in [other for other in self._numbers if other[0] == key[0] and other[1] > key[1]]:
            # a deeper list begins anew below the next item
            del self._numbers[other]
        self._numbers[key] = self._numbers.get(key, 0) + 1
        indent = "  " * style.list_level
        return f"{indent}- " if self._formats.get(key, "bullet") in ("bullet", "none") else f"{indent}{self._numbers[key]}. "

    def _style_of(self, paragraph: Any) -> _Style:
        """The style of a paragraph with what it states itself."""
        properties = next(iter(children(paragraph, "pPr")), None)
        named = _value(properties, "pStyle")
        style = self._styles.get(named or "", _Style("", None, None, 0))
        if properties is None:
            return style
        level, (list_id, list_level) = _outline_level(properties), _list_of(properties)
        if level is not None:
            style = style._replace(level=level if level < 9 else None)
        if list_id is not None:
            style = style._replace(list_id=None if list_id == "0" else list_id, list_level=list_level)
        return style

    def _text(self, paragraph: Any) -> tuple[str, list[str]]:
        """The text of a paragraph, its line breaks kept, and the lines of its footnotes."""
        notes: list[str] = []
        return "".join(self._parts(paragraph, notes)).strip(), notes

    def _parts(self, element: Any, notes: list[str]) -> Iterator[str]:
        for child in element:
            name = local_name(child)
            if name in _SKIPPED or (name == "r" and _is_hidden(child)):
                continue
            if name == "t":
                yield child.text or ""
            elif name in ("tab", "ptab"):
                yield " "
            elif name in ("br", "cr"):
                yield "\n"
            elif name == "noBreakHyphen":
                yield "-"
            elif name in ("footnoteReference", "endnoteReference"):
                yield self._note(name.removesuffix("Reference"), child.get(f"{_W}id"), notes)
            elif name == "txbxContent":
                self._boxes.append(child)
            else:
                yield from self._parts(child, notes)

    def _note(self, kind: str, number: str | None, notes: list[str]) -> str:
        note = self._notes.get(kind, {}).get(number)
        text = "" if note is None else one_line(" ".join(self._text(paragraph)[0] for paragraph in note.iter(f"{_W}p")))
        if not text:
            return ""
        self._note_count += 1
        notes.append(f"[^{self._note_count}]: {text}")
        return f"[^{self._note_count}]"

    def _table(self, table: Any) -> None:
        """A table. A cell over several rows is in each of them; one over several columns is in the first."""
        self._end_list()
        rows: list[list[str]] = []
        notes: list[str] = []
        cells_of_rows = [list(_inside(row, "tc")) for row in _inside(table, "tr")]
        if all(len(cells) <= 1 for cells in cells_of_rows):
            # a frame around text
            for cells in cells_of_rows:
                for cell in cells:
                    self._write_blocks(cell)
            self._end_list()
            return
        for cells in cells_of_rows:
            row: list[str] = []
            for cell in cells:
                properties = next(iter(children(cell, "tcPr")), None)
                merged = None if properties is None else next(iter(children(properties, "vMerge")), None)
                if merged is not None and merged.get(f"{_W}val", "continue") == "continue":
                    row.append(rows[-1][len(row)] if rows and len(row) < len(rows[-1]) else "")
                else:
                    row.append(self._cell(cell, notes))
                row += [""] * (_number(_value(properties, "gridSpan"), 1) - 1)
            rows.append(row)
        self.writer.table(rows)
        self.writer.paragraph(Piece(("\n" if number else "") + note) for number, note in enumerate(notes))

    def _cell(self, cell: Any, notes: list[str]) -> str:
        texts = []
        for paragraph in cell.iter(f"{_W}p"):
            if any(local_name(above) == "Fallback" for above in paragraph.iterancestors()):
                continue
            text, own = self._text(paragraph)
            texts.append(text)
            notes += own
        # text boxes in a cell were met as paragraphs in it
        self._boxes = []
        return one_line(" ".join(texts))


def _root(part: Any) -> Any:
    """The root element of a part of the package; None where there is no part."""
    if part is None:
        return None
    element = getattr(part, "element", None)
    return parse_xml(part.blob) if element is None else element


def _inside(element: Any, name: str) -> Iterator[Any]:
    """Children of a name, also those in content controls and the like."""
    for child in element:
        own = local_name(child)
        if own == name:
            yield child
        elif own in _WRAPPERS or own == "sdt":
            yield from _inside(child, name)


def _value(properties: Any, name: str) -> str | None:
    """What a property states."""
    if properties is None:
        return None
    return next((child.get(f"{_W}val") for child in children(properties, name)), None)


def _number(value: str | None, otherwise: int) -> int:
    return min(int(value), 1000) if value and value.isdecimal() else otherwise


def _outline_level(properties: Any) -> int | None:
    value = _value(properties, "outlineLvl")
    return None if value is None else _number(value, 9) + 1


def _list_of(properties: Any) -> tuple[str | None, int]:
    """The id of the list that a paragraph is an item of, and its level."""
    numbering = next(iter(children(properties, "numPr")), None)
    return (None, 0) if numbering is None else (_value(numbering, "numId"), _number(_value(numbering, "ilvl"), 0))


def _is_hidden(run: Any) -> bool:
    properties = next(iter(children(run, "rPr")), None)
    vanish = None if properties is None else next(iter(children(properties, "vanish")), None)
    return vanish is not None and vanish.get(f"{_W}val", "true") not in ("0", "false", "off")


def _is_contents(control: Any) -> bool:
    """Whether a content control is a table of contents."""
    gallery = next((element.get(f"{_W}val") or "" for element in control.iter(f"{_W}docPartGallery")), "")
    return gallery == "Table of Contents"


def _styles(root: Any) -> dict[str, _Style]:
    """Paragraph styles by their ids; the default one also by ``."""
    if root is None:
        return {}
    elements = {style.get(f"{_W}styleId"): style for style in children(root, "style")}

    def resolved(identity: str, depth: int) -> _Style:
        style = elements[identity]
        name = (_value(style, "name") or "").lower()
        based_on = _value(style, "basedOn")
        base = (
            resolved(based_on, depth + 1)
            if based_on is not None and based_on in elements and depth < 20
            else _Style("", None, None, 0)
        )
        properties = next(iter(children(style, "pPr")), None)
        level, (list_id, list_level) = (None, (None, 0)) if properties is None else (
            _outline_level(properties), _list_of(properties)
        )  # fmt: skip
        if match := _HEADING_STYLE.match(name):
            level = int(match[1])
        if level is None:
            level = base.level
        if list_id is None:
            list_id, list_level = base.list_id, base.list_level
        if list_id is None and (match := re.match(r"list (?:bullet|number)(?: (\d))?$", name)):
            list_id, list_level = name.split()[1], int(match[1] or 1) - 1
        return _Style(name, level if level is None or level < 10 else None, None if list_id == "0" else list_id, list_level)

    styles = {identity: resolved(identity, 0) for identity in elements if identity}
    default = next((style.get(f"{_W}styleId") for style in children(root, "style") if style.get(f"{_W}default") == "1"), None)
    return styles | ({"": styles[default]} if default in styles else {})


def _list_formats(root: Any) -> dict[tuple[str, int], str]:
    """How the items of a list are numbered, by its id and level: `bullet`, `decimal`, …"""
    formats: dict[tuple[str, int], str] = {("number", level): "decimal" for level in range(9)}
    if root is None:
        return formats
    abstract = {
        kind.get(f"{_W}abstractNumId"): [
            (_number(level.get(f"{_W}ilvl"), 0), _value(level, "numFmt") or "bullet") for level in children(kind, "lvl")
        ]
        for kind in children(root, "abstractNum")
    }
    for number in children(root, "num"):
        for level, written in abstract.get(_value(number, "abstractNumId"), ()):
            formats[number.get(f"{_W}numId") or "", level] = written
    return formats
