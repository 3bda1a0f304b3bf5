"""Source `html`: trees and archives of saved web pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bessemer.data.sources.config import HtmlSource
from bessemer.data.sources.document import Tally
from bessemer.data.sources.formats.pages import Extraction, page_document
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument

HTML_SUFFIXES = (".html", ".htm", ".xhtml")


@dataclass(frozen=True)
class Html:
    """One page a file. `base_url`, where it is given, and the file's path below the root make its address."""

    max_document_bytes: int
    extraction: Extraction = field(default_factory=Extraction)
    base_url: str | None = None
    known: str = "/".join(HTML_SUFFIXES)
    small: bool = True
    archives: tuple[str, ...] = ARCHIVES

    def reads(self, name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in HTML_SUFFIXES

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        page = None if start else entry.content(self.max_document_bytes, tally)
        if page is not None:
            url = f"{self.base_url.rstrip('/')}/{entry.name}" if self.base_url else None
            described = {"file": entry.name}
            document = page_document(
                page, entry.name, entry.place, self.extraction, tally, url=url, license=entry.license, metadata=described
            )
            if document is not None:
                yield 1, document


def open_html(settings: HtmlSource, folder: Path, cache: Path) -> FileSource:
    """The source `html` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Html(settings.max_document_bytes, Extraction(settings.extractor), settings.base_url))
