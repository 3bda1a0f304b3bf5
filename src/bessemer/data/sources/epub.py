"""Source `epub`: electronic books, chapter by chapter in the order of the spine."""

from __future__ import annotations

import io
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import unquote

from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat
from bessemer.data.sources.markup import children, descendant_text, local_name, parse_xml, text_of_markup
from bessemer.data.sources.registry import EpubSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable, license_of_address

_PAGE_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
#: Fonts may be obfuscated in a book that can be read.
_FONT_OBFUSCATION = (b"http://www.idpf.org/2008/embedding", b"http://ns.adobe.com/pdf/enc#RC")
_LARGEST_INDEX = 16 << 20
#: What reading a damaged zip may raise.
_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, RuntimeError, EOFError, OSError)


@dataclass(frozen=True)
class Epub(SettingsFormat):
    """One document a book, or one a chapter."""

    settings: EpubSource
    known: ClassVar[str] = ".epub"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".epub")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if start and not self.settings.by_chapter:
            return
        data = entry.content(self.settings.max_file_bytes, tally)
        if data is None:
            return
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as book:
                yield from self._documents(_Book(book, entry, self.settings.max_document_bytes, tally), start, tally)
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
            if self.settings.by_chapter:
                locator = f"{book.entry.name}#{encodable(name)}"
                described = metadata | {"file": book.entry.name, "chapter": str(number)}
                yield (
                    number,
                    Document(locator, text, license=license or book.entry.license, group=book.entry.name, metadata=described),
                )
                continue
            size += len(text.encode())
            if size > self.settings.max_document_bytes:
                tally.set_aside("cut_documents", book.entry.place, f"its text was cut before {name}")
                break
            chapters.append(text)
        if self.settings.by_chapter:
            return
        if not chapters:
            tally.set_aside("files_without_text", book.entry.place, "no chapter has text")
            return
        described = metadata | {"file": book.entry.name}
        yield 1, Document(book.entry.name, "\n\n".join(chapters), license=license or book.entry.license, metadata=described)


open_epub = Epub.open


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
