"""Source `docs`: documentation as written, Markdown and reStructuredText trees, and as built, HTML inside packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bessemer.data.sources.config import DocsSource
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.formats.code import repository_of
from bessemer.data.sources.formats.pages import Extraction, page_document
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.origins.wheels import is_prose_page, readable_page
from bessemer.data.sources.source import PositionedDocument

_MARKUP = (".md", ".markdown", ".mdx", ".rst")
_HTML = (".html", ".htm")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.{0,20000}?\n(?:---|\.\.\.)[ \t]*\n", re.S)
_FRONT_TITLE = re.compile(r"^title:[ \t]*[\"']?(.+?)[\"']?[ \t]*$", re.M)
_HEADING = re.compile(r"^#{1,2}[ \t]+(.{1,200})$|^(.{1,200})\n(?:=+|-+|~+|\*+)[ \t]*$", re.M)
#: Lines of a page that are for Sphinx or MDX, not for a reader; a directive's options and body follow indented.
_MACHINERY = re.compile(
    r"^\.\. (?:toctree|contents|meta|index|highlight|currentmodule|module|automodule|autoclass|autofunction|autosummary"
    r"|include|literalinclude|raw|only|rst-class|_[^:\n]+):.*\n(?:[ \t]+.*\n|[ \t]*\n(?=[ \t]))*"
    r"|^(?:import|export) .+ from ['\"].+['\"];?[ \t]*\n",
    re.M,
)
#: Folders and files that a documentation builder makes beside the pages.
_BUILT = re.compile(
    r"(?:^|/)(?:_static|_sources|_modules|_images|__pycache__|node_modules)/|(?:genindex|search|py-modindex)\.html$"
)


@dataclass(frozen=True)
class Docs:
    """One document a page."""

    max_document_bytes: int
    extraction: Extraction = field(default_factory=Extraction)
    known: str = "/".join((*_MARKUP, *_HTML)) + ", also in packages and archives"
    small: bool = True
    archives: tuple[str, ...] = field(default=ARCHIVES)

    def reads(self, name: str) -> bool:
        return name.lower().endswith((*_MARKUP, *_HTML)) and is_prose_page(name) and not _BUILT.search(name)

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if entry.is_link:
            tally.counts["links"] += 1
            return
        data = None if start else entry.content(self.max_document_bytes, tally)
        if data is None:
            return
        license, group = entry.license_nearby(), repository_of(entry)
        metadata = {"file": entry.name}
        if entry.name.lower().endswith(_HTML):
            document = page_document(
                data, entry.name, entry.place, self.extraction, tally, license=license, group=group, metadata=metadata
            )
            if document is not None:
                yield 1, document
            return
        text, title = page_text(data.decode("utf-8-sig", errors="replace"), PurePosixPath(entry.name).suffix.lower())
        if title:
            metadata["title"] = title
        yield 1, Document(entry.name, text, license=license, group=group, metadata=metadata)


def open_docs(settings: DocsSource, folder: Path, cache: Path) -> FileSource:
    """The source `docs` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Docs(settings.max_document_bytes, Extraction(settings.extractor)))


def page_text(source: str, suffix: str) -> tuple[str, str]:
    """A page's text, without badges and what steers the builder, and its title."""
    source = source.replace("\r\n", "\n")
    title = ""
    if suffix != ".rst" and (front := _FRONT_MATTER.match(source)):
        stated = _FRONT_TITLE.search(front[0])
        title = stated[1] if stated else ""
        source = source[front.end() :]
    text = readable_page(_MACHINERY.sub("", source + "\n"))
    heading = _HEADING.search(text[:5000])
    return text, title or (" ".join((heading[1] or heading[2]).split()) if heading else "")
