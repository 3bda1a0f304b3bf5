"""Source `pdf`: the text layer of PDF files, page by page. Scanned pages hold none; they are counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.data.limited import RefusedError
from bessemer.data.sources.config import PdfSource
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument

_DESCRIBED = {"Title": "title", "Author": "author", "CreationDate": "created"}
_MOST_PAGES = 20_000
#: A word cut at a line's end: pdfium marks the hyphen with U+FFFE, or leaves it.
_CUT_WORD = re.compile(r"(?<=[^\W\d_])(?:\ufffe|\xad|[-‐]\n(?=[a-z]))\n?")


@dataclass(frozen=True)
class Pdf:
    """One document a file."""

    max_file_bytes: int
    max_document_bytes: int
    seconds: float
    known: str = ".pdf"
    small: bool = True
    archives: tuple[str, ...] = ARCHIVES

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".pdf")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        data = None if start else entry.content(self.max_file_bytes, tally)
        if data is None:
            return
        try:
            pages, metadata, is_whole = entry.around.helpers.call(pages_of_pdf, self.seconds, data, self.max_document_bytes)
        except RefusedError as refused:
            if "password" in str(refused).lower():
                tally.set_aside("encrypted_files", entry.place, "it needs a password")
            else:
                tally.set_aside(refused.kind, entry.place, str(refused))
            return
        text = "\n\n".join(page for page in pages if page)
        if not text:
            tally.set_aside("files_without_text", entry.place, f"none of its {len(pages)} pages has text; scanned?")
            return
        if not is_whole:
            tally.set_aside("cut_documents", entry.place, f"its text was cut after page {len(pages)}")
        described = {"file": entry.name, "pages": str(len(pages))} | metadata
        yield 1, Document(entry.name, text, license=entry.license, metadata=described)


def open_pdf(settings: PdfSource, folder: Path, cache: Path) -> FileSource:
    """The source `pdf` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Pdf(settings.max_file_bytes, settings.max_document_bytes, settings.seconds))


def pages_of_pdf(data: bytes, max_bytes: int) -> tuple[list[str], dict[str, str], bool]:
    """The text of each page, what the file says about itself, and whether that is all of it or `max_bytes` were reached."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    try:
        said = document.get_metadata_dict()
        metadata = {ours: encodable(said[theirs]) for theirs, ours in _DESCRIBED.items() if said.get(theirs)}
        pages: list[str] = []
        size = 0
        for number in range(len(document)):
            if size > max_bytes or number >= _MOST_PAGES:
                return pages, metadata, False
            pages.append(_page_text(document, number))
            size += len(pages[-1].encode())
        return pages, metadata, True
    finally:
        document.close()


def _page_text(document: Any, number: int) -> str:
    try:
        page = document[number]
        text = page.get_textpage().get_text_range(errors="ignore")
    except Exception:  # pdfium's own, for a damaged page: the others may be whole
        return ""
    page.close()
    lines = [line.rstrip() for line in _CUT_WORD.sub("", encodable(text.replace("\r\n", "\n"))).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
