"""Source `mediawiki`: XML dumps of Wikipedia and other wikis, page by page.

The dump is cut at `<page>` and `</page>`, and each page parsed on its own: damage stays in its page, memory is bounded by
the longest, and reading goes on from a byte offset, or from the stream of a multistream `.bz2` in which a page stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bessemer.data.limited import RefusedError
from bessemer.data.sources.config import MediaWikiSource
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.formats.pages import urlsplit_host
from bessemer.data.sources.formats.records import note_end
from bessemer.data.sources.formats.wikitext import wikitext_to_text
from bessemer.data.sources.formats.xml import children, parse_xml
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.cutting import Marks, fragments
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument

_HEAD_BYTES = 1 << 20
_WIKIMEDIA = re.compile(
    r"(^|\.)(wikipedia|wiktionary|wikibooks|wikiquote|wikisource|wikiversity|wikivoyage|wikinews|wikimedia)\.org$"
)
#: https://foundation.wikimedia.org/wiki/Policy:Terms_of_Use, section 7; Wikinews alone differs.
_WIKIMEDIA_LICENSE = "CC-BY-SA-4.0"
_FILE_NAMESPACES, _MEDIA, _CATEGORY = (6, -2), "Media", 14


@dataclass(frozen=True)
class MediaWiki:
    """One document a page, redirects left out."""

    max_document_bytes: int
    namespaces: tuple[int, ...] = (0,)
    seconds: float = 20.0
    known: str = ".xml, plain or compressed"
    small: bool = False
    archives: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".xml") or "-pages-articles" in name

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        site = _site(entry)
        marks = Marks(entry, start)
        with marks.stream as stream:
            for begin, end, fragment in fragments(stream, b"<page>", b"</page>", self.max_document_bytes):
                if not marks.begins(begin):
                    continue
                place = f"{entry.place}: {marks.where(begin)}"
                if fragment is None:
                    tally.set_aside("too_large", place, f"a page of {end - begin:,} bytes")
                    continue
                try:
                    document = self._document(fragment, site, entry, tally)
                except ValueError as error:
                    tally.set_aside("damaged_records", place, str(error))
                except RefusedError as refused:
                    tally.set_aside(refused.kind, place, str(refused))
                else:
                    if document is not None:
                        yield marks.behind(end), document
            note_end(entry, stream.damage, stream.tell(), tally)

    def _document(self, fragment: bytes, site: _Site, entry: Entry, tally: Tally) -> Document | None:
        page = parse_xml(fragment, forgiving=False)
        said = {name: _text(page, name) for name in ("title", "ns", "id")}
        if not said["id"]:
            raise ValueError("a page without an id")
        if int(said["ns"] or 0) not in self.namespaces:
            tally.counts["pages_of_other_namespaces"] += 1
            return None
        revisions = children(page, "revision")
        wikitext = _text(revisions[-1], "text") if revisions else ""
        if children(page, "redirect") or re.match(r"\s*#redirect\b", wikitext, re.I):
            tally.counts["redirects"] += 1
            return None
        text = entry.around.helpers.call(wikitext_to_text, self.seconds, wikitext, site.left_out)
        if not text:
            tally.counts["pages_without_text"] += 1
            return None
        title = encodable(said["title"])
        metadata = {"page": said["id"], "title": title, "wiki": site.name}
        if revision := _text(revisions[-1], "id"):
            metadata["revision"] = revision
        if stamp := _text(revisions[-1], "timestamp"):
            metadata["date"] = stamp
        return Document(
            f"{site.name}/{said['id']}",
            text,
            heading=title,
            url=site.address(title),
            license=entry.license or site.license,
            metadata=metadata,
        )


def open_mediawiki(settings: MediaWikiSource, folder: Path, cache: Path) -> FileSource:
    """The source `mediawiki` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, MediaWiki(settings.max_document_bytes, tuple(settings.namespaces), settings.seconds))


@dataclass(frozen=True)
class _Site:
    """What the dump's head says about the wiki."""

    name: str
    base: str | None
    #: Prefixes of links that show nothing or an image: the wiki's own names of its files and categories.
    left_out: tuple[str, ...]

    @property
    def license(self) -> str | None:
        host = urlsplit_host(self.base) if self.base else None
        return _WIKIMEDIA_LICENSE if host and _WIKIMEDIA.search(host) else None

    def address(self, title: str) -> str | None:
        """The page's address, formed like the main page's."""
        return self.base.rpartition("/")[0] + "/" + quote(title.replace(" ", "_"), safe="/:(),'!*@") if self.base else None


def _site(entry: Entry) -> _Site:
    with entry.open() as stream:
        head = stream.read(_HEAD_BYTES)
    found = re.search(rb"<siteinfo>.*?</siteinfo>", head, re.S)
    left_out = ["File", "Image", _MEDIA, "Category"]
    name, base = entry.name.rpartition("/")[2].removesuffix(".xml"), None
    if found:
        try:
            info = parse_xml(found[0])
        except ValueError:
            return _Site(name, base, tuple(left_out))
        name, base = _text(info, "dbname") or name, _text(info, "base") or None
        for group in children(info, "namespaces"):
            for namespace in children(group, "namespace"):
                if namespace.get("key") in {str(key) for key in (*_FILE_NAMESPACES, _CATEGORY)} and namespace.text:
                    left_out.append(namespace.text)
    return _Site(encodable(name), base, tuple(dict.fromkeys(prefix.lower() for prefix in left_out)))


def _text(element: Any, name: str) -> str:
    found = children(element, name)
    return (found[0].text or "").strip() if found else ""
