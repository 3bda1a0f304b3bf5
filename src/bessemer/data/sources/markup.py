"""HTML and XML that is all text to plain text with its structure, and the source `epub`, whose chapters are such.

Books' chapters, forums' posts and pages of documentation: headings, lists, quotations, code and tables as Markdown writes
them, without looking for boilerplate. XML parsing is bounded: no entities are expanded, no DTD and no network is read, and
trees stay within libxml's limits. Electronic books are read chapter by chapter in the order of the spine.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lxml import etree

from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.file_source import FileSource, file_source
from bessemer.data.sources.registry import EpubSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable, license_of_address


def parse_xml(data: bytes, *, forgiving: bool = True) -> Any:
    """The root element of a document or fragment. Raises ValueError when there is none, or it is nested too deeply.

    `forgiving` reads on over mistakes as browsers do. An entity that a document defines for itself stays what it is, so
    that a few bytes cannot expand to gigabytes.
    """
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        recover=forgiving,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not XML ({error})") from None
    if root is None:
        raise ValueError("not XML (no element found)")
    return root


def local_name(element: Any) -> str:
    """An element's name without its namespace; `` for comments, entities and the like."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def children(element: Any, name: str) -> list[Any]:
    """The direct children with this local name."""
    return [child for child in element if local_name(child) == name]


def descendant_text(element: Any, name: str) -> str | None:
    """The text of the first descendant with this local name, stripped; None where there is none with text."""
    for found in element.iter():
        if local_name(found) == name and (text := "".join(found.itertext()).strip()):
            return text
    return None


_SKIPPED = frozenset(
    {"script", "style", "head", "template", "noscript", "svg", "iframe", "object", "button", "select", "rt", "rp"}
)
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt", "fieldset"}
    | {"figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "legend", "li"}
    | {"main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"}
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
#: More than any book's chapter or forum's post has.
_MOST_ELEMENTS = 300_000
#: White space that is not a single space already: the usual case costs nothing.
_WHITE_SPACE = re.compile(r"[ \t\n\r\f]{2,}|[\t\n\r\f]")
_SPACES = re.compile(" {2,}")


def text_of_markup(data: bytes | str) -> str:
    """The text of a page or fragment. Raises ValueError where there is none to be parsed, or far too much.

    Walks without recursion, so that nesting cannot exhaust the stack; libxml2 itself stops at 255 levels.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", errors="replace")
        parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    else:
        parser = etree.HTMLParser(encoding=_declared(data), no_network=True, remove_comments=True, remove_pis=True)
    if not data.strip():
        return ""
    try:
        root = etree.fromstring(data, parser)
    except etree.ParserError as error:
        raise ValueError(f"not HTML ({error})") from None
    if root is None:
        return ""
    writer = _Writer()
    count = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if event == "start":
            count += 1
            if count > _MOST_ELEMENTS:
                raise ValueError(f"more than {_MOST_ELEMENTS:,} elements")
            writer.enter(element)
        else:
            writer.leave(element)
    return writer.finish()


def _declared(data: bytes) -> str | None:
    found = re.search(rb"""(?:encoding|charset)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", data[:1024])
    if found is None:
        return "utf-8"
    try:
        etree.HTMLParser(encoding=found[1].decode("ascii"))
    except LookupError:
        return "utf-8"
    return found[1].decode("ascii")


class _Writer:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line: list[str] = []
        self._skipping = self._preformatted = self._quotes = self._cells = 0
        # the next number of each open ordered list, None for the others
        self._lists: list[int | None] = []
        self._marker = ""

    def enter(self, element: Any) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if self._skipping or tag in _SKIPPED:
            self._skipping += 1
            return
        if tag in _BLOCKS and not (self._cells and tag in ("p", "div", "td", "th")):
            self._end_line()
        if tag in _HEADINGS:
            self._blank()
            self._marker = _HEADINGS[tag]
        elif tag == "pre":
            self._blank()
            self._line.append("```\n")
            self._preformatted += 1
        elif tag == "blockquote":
            self._blank()
            self._quotes += 1
        elif tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._marker = self._list_marker()
        elif tag in ("td", "th"):
            if self._cells:
                self._line.append(" | ")
            self._cells += 1
        elif tag == "tr":
            self._cells = 0
        elif tag == "br":
            self._line.append("\n")
        elif tag == "code" and not self._preformatted:
            self._line.append("`")
        elif tag in ("p", "table", "dl"):
            self._blank()
        self._add(element.text)

    def leave(self, element: Any) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if self._skipping:
            self._skipping -= 1
            if not self._skipping:
                self._add(element.tail)
            return
        if tag == "pre":
            self._preformatted -= 1
            if self._line and not self._line[-1].endswith("\n"):
                self._line.append("\n")
            self._line.append("```")
            self._end_line()
            self._blank()
        elif tag == "code" and not self._preformatted:
            self._line.append("`")
        elif tag == "tr":
            self._cells = 0
            self._end_line()
        elif tag in _BLOCKS and not (self._cells and tag in ("p", "div", "td", "th")):
            self._end_line()
            if tag in ("p", "table", "blockquote", "dl") or tag in _HEADINGS:
                self._blank()
        if tag == "blockquote":
            self._quotes -= 1
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            if not self._lists:
                self._blank()
        self._add(element.tail)

    def _list_marker(self) -> str:
        indent = "  " * (len(self._lists) - 1)
        if not self._lists or self._lists[-1] is None:
            return f"{indent}- "
        number = self._lists[-1]
        self._lists[-1] = number + 1
        return f"{indent}{number}. "

    def _add(self, text: str | None) -> None:
        if text:
            self._line.append(text if self._preformatted else _WHITE_SPACE.sub(" ", text))

    def _end_line(self) -> None:
        text = "".join(self._line)
        self._line = []
        if not self._preformatted and "```" not in text:
            text = "\n".join(part.strip() for part in _SPACES.sub(" ", text).split("\n")).strip()
        if text.strip():
            quote = "> " * min(self._quotes, 8)
            lines = (self._marker + text.strip("\n")).split("\n")
            self._lines += [quote + line if quote else line for line in lines]
            self._marker = ""

    def _blank(self) -> None:
        self._end_line()
        if self._lines and self._lines[-1]:
            self._lines.append("")

    def finish(self) -> str:
        self._end_line()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in self._lines)).strip()


_PAGE_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
#: Fonts may be obfuscated in a book that can be read.
_FONT_OBFUSCATION = (b"http://www.idpf.org/2008/embedding", b"http://ns.adobe.com/pdf/enc#RC")
_LARGEST_INDEX = 16 << 20
#: What reading a damaged zip may raise.
_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, RuntimeError, EOFError, OSError)


@dataclass(frozen=True)
class Epub:
    """One document a book, or one a chapter."""

    max_file_bytes: int
    max_document_bytes: int
    by_chapter: bool = False
    known: str = ".epub"
    small: bool = True
    archives: tuple[str, ...] = field(default=ARCHIVES)

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".epub")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if start and not self.by_chapter:
            return
        data = entry.content(self.max_file_bytes, tally)
        if data is None:
            return
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as book:
                yield from self._documents(_Book(book, entry, self.max_document_bytes, tally), start, tally)
        except _DAMAGE as error:
            tally.set_aside("damaged_files", entry.place, f"not a readable book ({error})")

    def _documents(self, book: _Book, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if book.is_encrypted():
            tally.set_aside("encrypted_files", book.entry.place, "the book is protected")
            return
        package, folder = book.package()
        metadata, license = _described(package)
        chapters: list[str] = []
        size = 0
        for number, name in enumerate(_spine(package, folder), start=1):
            if number <= start or not (text := book.chapter(name)):
                continue
            if self.by_chapter:
                locator = f"{book.entry.name}#{encodable(name)}"
                described = metadata | {"file": book.entry.name, "chapter": str(number)}
                yield (
                    number,
                    Document(locator, text, license=license or book.entry.license, group=book.entry.name, metadata=described),
                )
                continue
            size += len(text.encode())
            if size > self.max_document_bytes:
                tally.set_aside("cut_documents", book.entry.place, f"its text was cut before {name}")
                break
            chapters.append(text)
        if self.by_chapter:
            return
        if not chapters:
            tally.set_aside("files_without_text", book.entry.place, "no chapter has text")
            return
        described = metadata | {"file": book.entry.name}
        yield 1, Document(book.entry.name, "\n\n".join(chapters), license=license or book.entry.license, metadata=described)


def open_epub(settings: EpubSource, folder: Path, cache: Path) -> FileSource:
    """The source `epub` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Epub(settings.max_file_bytes, settings.max_document_bytes, settings.by_chapter))


@dataclass
class _Book:
    archive: zipfile.ZipFile
    entry: Entry
    max_bytes: int
    tally: Tally

    def _content(self, name: str, limit: int) -> bytes:
        with self.archive.open(name) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{name} is over {limit:,} bytes")
        return data

    def is_encrypted(self) -> bool:
        if _ENCRYPTION not in self.archive.namelist():
            return False
        stated = self._content(_ENCRYPTION, _LARGEST_INDEX)
        return stated.count(b"EncryptionMethod") > sum(stated.count(method) for method in _FONT_OBFUSCATION)

    def package(self) -> tuple[Any, str]:
        """The package document and the folder that its addresses are relative to."""
        container = parse_xml(self._content(_CONTAINER, _LARGEST_INDEX))
        path = next((root.get("full-path") for root in container.iter() if local_name(root) == "rootfile"), None)
        if not path:
            raise ValueError("no package document is named in it")
        return parse_xml(self._content(path, _LARGEST_INDEX)), posixpath.dirname(path)

    def chapter(self, name: str) -> str:
        try:
            return text_of_markup(self._content(name, self.max_bytes))
        except _DAMAGE as error:
            self.tally.set_aside("damaged_members", f"{self.entry.place}/{encodable(name)}", str(error))
            return ""


def _spine(package: Any, folder: str) -> list[str]:
    """The names of the book's pages in reading order, each once: a spine that names one again is no valid EPUB (3.3, 5.7.2)."""
    items = {item.get("id"): item for manifest in children(package, "manifest") for item in children(manifest, "item")}
    names: dict[str, None] = {}
    for spine in children(package, "spine"):
        for reference in children(spine, "itemref"):
            item = items.get(reference.get("idref"))
            if item is None or item.get("media-type") not in _PAGE_TYPES or "nav" in (item.get("properties") or "").split():
                continue
            names[posixpath.normpath(posixpath.join(folder, unquote(item.get("href") or "")))] = None
    return list(names)


def _described(package: Any) -> tuple[dict[str, str], str | None]:
    fields = {"title": "title", "creator": "author", "language": "stated_language", "date": "published", "rights": "rights"}
    said = {ours: encodable(text) for theirs, ours in fields.items() if (text := descendant_text(package, theirs))}
    return said, license_of_address(said.get("rights", ""))
