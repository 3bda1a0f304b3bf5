"""Pictures with what pages say about them: of trees and archives of saved pages, of web archives, of PDF files.

Pages and pictures lie in any order and in different files, so both are read twice: first the pages, and the names of the
pictures that there are; then those pictures that a page has said something about. Nothing is fetched, and a name that leads
out of the tree or the archive leads to nothing.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from bessemer.core.progress import Progress
from bessemer.data.extraction.extract import to_utf8
from bessemer.data.limited import Helpers, RefusedError
from bessemer.data.sources.html import HTML_SUFFIXES, license_link, opt_out
from bessemer.data.sources.io.archives import Entry, Surroundings, entries
from bessemer.data.sources.io.fetch import FetchError, normal_url
from bessemer.data.sources.io.file_source import FileSource, SettingsFormat
from bessemer.data.sources.source import Tally
from bessemer.data.sources.warc import ServedRecord, served_records
from bessemer.posttraining.data.picture_rows import SUFFIXES
from bessemer.posttraining.pictures.config import PicturesConfig, PictureSource
from bessemer.posttraining.pictures.pages import MentionedPicture, PageText, pictures_of_page
from bessemer.posttraining.pictures.pdf import pictures_of_pdf

_HEAD = 1 << 16
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_DATA_URI = re.compile(r"data:(image/[\w.+-]+)?(?:;[\w=.+-]+)*?(;base64)?,", re.IGNORECASE)


@dataclass(frozen=True)
class Mention:
    """A picture, and what is said about it, the text that says most first. page: address or file of where it stands.
    picture: its own. place: for notes."""

    texts: tuple[PageText, ...]
    page: str
    picture: str
    place: str
    source: str
    license: str | None = None
    opt_out: str | None = None


#: Whether a picture is wanted by what is said about it, before it is read.
Wanted = Callable[[Mention], bool]
Found = Iterator[tuple[Mention, bytes]]


def found_pictures(source: PictureSource, config: PicturesConfig, folder: Path, wanted: Wanted, tally: Tally) -> Found:
    """The pictures of a source that are wanted, each with the bytes of its file, in a fixed order. folder: where paths begin.

    One picture is given once, as the first page that is wanted says it. Raises SourceError for paths that lead to nothing.
    """
    find = {"html": _of_trees, "warc": _of_web_archives, "pdf": _of_pdf}[source.source]
    return find(source, config, opened(source, folder), wanted, tally)


def opened(source: PictureSource, folder: Path) -> FileSource:
    """The files of a source, pages and pictures."""
    kind: type[SettingsFormat] = {"html": _Saved, "warc": _Archived, "pdf": _Documents}[source.source]
    return FileSource(tuple(source.paths), folder, kind(source), source.license)


@dataclass(frozen=True)
class _Saved(SettingsFormat):
    known: ClassVar[str] = "/".join((*HTML_SUFFIXES, *SUFFIXES))
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        # a saved picture may keep its query behind its name
        return PurePosixPath(name.partition("?")[0]).suffix.lower() in (*HTML_SUFFIXES, *SUFFIXES)


@dataclass(frozen=True)
class _Archived(SettingsFormat):
    known: ClassVar[str] = ".warc, plain or with .gz or .zst"
    archives: ClassVar[tuple[str, ...]] = ()

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".warc")


@dataclass(frozen=True)
class _Documents(SettingsFormat):
    known: ClassVar[str] = ".pdf"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".pdf")


def _entries(files: FileSource, tally: Tally) -> Iterator[Entry]:
    for unit in files.units():
        with closing(Helpers()) as helpers:
            around = Surroundings(files.license, helpers=helpers)
            for _, entry in entries(unit, 0, files.format.reads, files.format.archives, around, tally):
                yield entry


class _Pages:
    """The pictures that pages mention, by the names under which they may lie."""

    def __init__(self, source: PictureSource, wanted: Wanted) -> None:
        self._source = source
        self._wanted = wanted
        #: Names of pictures that there are.
        self.there: set[str] = set()
        #: Mentions, each with the names under which its picture may lie, the first preferred.
        self._mentions: list[tuple[list[str], Mention]] = []
        self.in_pages: list[tuple[Mention, bytes]] = []
        self._nowhere = 0

    def read(
        self,
        page: bytes,
        name: str,
        place: str,
        names_of: Callable[[str, str], Iterable[str]],
        *,
        license: str | None,
        headers: list[tuple[str, str]],
        said: str | None = None,
    ) -> None:
        """Note the pictures of a page in UTF-8. names_of: of an address and the page's base, the names of a picture. said: an
        objection that the archive has noted."""
        head = page[:_HEAD].decode("utf-8", errors="ignore")
        objection = ", ".join(filter(None, (opt_out(head, headers), said))) or None
        stated = license_link(page) or license
        found = pictures_of_page(page)
        for picture in found.pictures:
            self._mention(picture, name, place, stated, objection, lambda address: names_of(address, found.base))

    def _mention(
        self,
        picture: MentionedPicture,
        page: str,
        place: str,
        license: str | None,
        objection: str | None,
        names_of: Callable[[str], Iterable[str]],
    ) -> None:
        addresses = [address for address in picture.addresses if not address.startswith("data:")]
        names = [name for address in addresses for name in names_of(address)]
        shown = addresses[0] if addresses else "in the page"
        texts, own = tuple(picture.texts), picture.license or license
        mention = Mention(texts, page, shown, f"{place}: {shown[:200]}", self._source.title, own, objection)
        if not self._wanted(mention):
            return
        inside = next((data for address in picture.addresses if (data := bytes_of_uri(address)) is not None), None)
        if names:
            self._mentions.append((names, mention))
        elif inside is not None:
            self.in_pages.append((mention, inside))
        else:
            self._nowhere += 1

    def by_name(self, tally: Tally) -> dict[str, Mention]:
        """The first mention of each picture that is there."""
        found: dict[str, Mention] = {}
        if self._nowhere:
            tally.counts["pictures_not_saved"] += self._nowhere
        for names, mention in self._mentions:
            name = next((name for name in names if name in self.there), None)
            if name is None:
                tally.counts["pictures_not_saved"] += 1
            else:
                found.setdefault(name, mention)
        self._mentions = []
        return found


def _of_trees(source: PictureSource, config: PicturesConfig, files: FileSource, wanted: Wanted, tally: Tally) -> Found:
    pages = _Pages(source, wanted)
    for entry in _entries(files, tally):
        if PurePosixPath(entry.name).suffix.lower() not in HTML_SUFFIXES:
            pages.there.add(entry.name)
            continue
        content = entry.content(config.max_page_bytes, tally)
        if content is None:
            continue
        tally.counts["pages"] += 1
        names = _TreeNames(entry.name, entry.around.archive, source.base_url)
        license = entry.license_nearby()
        pages.read(to_utf8(content), names.url or entry.name, entry.place, names, license=license, headers=[])
    yield from pages.in_pages
    by_name = pages.by_name(tally)
    again = Tally()
    for entry in _entries(files, again) if by_name else ():
        mention = by_name.pop(entry.name, None)
        content = None if mention is None else entry.content(config.max_picture_bytes, tally)
        if mention is not None and content is not None:
            yield mention, content


@dataclass(frozen=True)
class _TreeNames:
    """Names in a tree or an archive of the pictures of a page. page: its own name. archive: the archive's, "" in a tree."""

    page: str
    archive: str
    base_url: str | None

    @property
    def url(self) -> str | None:
        """The page's address."""
        return f"{self.base_url.rstrip('/')}/{self._inside}" if self.base_url else None

    def __call__(self, address: str, base: str) -> Iterator[str]:
        """Where the picture of an address may lie."""
        try:
            target = urlsplit(urljoin(base, address) if base else address)
        except ValueError:
            return
        if target.scheme and target.scheme not in ("http", "https"):
            return
        query = f"?{target.query}" if target.query else ""
        paths = [f"{target.path}{query}", target.path] if query else [target.path]
        for path in [*paths, *map(unquote, paths)]:
            if target.netloc:
                root = (self.base_url or "").rstrip("/")
                whole = f"{target.scheme or urlsplit(root).scheme}://{target.netloc}{path}"
                if root and whole.startswith(f"{root}/"):
                    yield from self._named(whole[len(root) + 1 :])
                # mirrors have a folder for each host
                yield from self._named(f"{target.netloc}{path}")
            elif path.startswith("/"):
                yield from self._named(path.lstrip("/"))
                yield from self._named(f"{self._inside.partition('/')[0]}{path}")
            else:
                yield from self._named(posixpath.join(posixpath.dirname(self._inside), path))

    @property
    def _inside(self) -> str:
        return self.page.removeprefix(f"{self.archive}/") if self.archive else self.page

    def _named(self, path: str) -> Iterator[str]:
        normal = posixpath.normpath(path)
        if not normal.startswith(("..", "/")) and normal != ".":
            yield f"{self.archive}/{normal}" if self.archive else normal


def _of_web_archives(source: PictureSource, config: PicturesConfig, files: FileSource, wanted: Wanted, tally: Tally) -> Found:
    pages = _Pages(source, wanted)

    def is_page(record: ServedRecord) -> bool:
        if record.kind.startswith("image/") and (name := _normal(record.url)) is not None:
            pages.there.add(name)
        return record.kind in _PAGE_TYPES

    for entry in _entries(files, tally):
        for record, content in served_records(entry, is_page, max(config.max_page_bytes, config.max_picture_bytes), tally):
            if len(content) > config.max_page_bytes:
                tally.set_aside("too_large", record.place, f"over {config.max_page_bytes:,} bytes")
                continue
            tally.counts["pages"] += 1
            page = to_utf8(content, encoding=record.charset)
            names = _ServedNames(record.url)
            pages.read(
                page, record.url, record.place, names, license=entry.license, headers=record.headers, said=record.opt_out
            )
    yield from pages.in_pages
    by_name = pages.by_name(tally)

    def is_wanted(record: ServedRecord) -> bool:
        return record.kind.startswith("image/") and _normal(record.url) in by_name

    again = Tally()
    for entry in _entries(files, again) if by_name else ():
        for record, content in served_records(entry, is_wanted, config.max_picture_bytes, again):
            mention = by_name.pop(_normal(record.url) or "", None)
            # the server may object to the picture and not to the page
            if mention is not None:
                objection = mention.opt_out or record.opt_out or opt_out("", record.headers)
                yield replace(mention, opt_out=objection), content


@dataclass(frozen=True)
class _ServedNames:
    page: str

    def __call__(self, address: str, base: str) -> Iterator[str]:
        try:
            whole = urljoin(urljoin(self.page, base), address)
        except ValueError:
            return
        if (name := _normal(whole)) is not None:
            yield name


def _normal(url: str) -> str | None:
    try:
        return normal_url(url)
    except (FetchError, ValueError):
        return None


def bytes_of_uri(address: str) -> bytes | None:
    """The bytes of a `data:` URI of a picture; None for anything else."""
    head = _DATA_URI.match(address)
    if head is None:
        return None
    data = unquote_to_bytes(address[head.end() :])
    try:
        return base64.b64decode(data) if head[2] else data
    except (binascii.Error, ValueError):
        return None


def _of_pdf(source: PictureSource, config: PicturesConfig, files: FileSource, wanted: Wanted, tally: Tally) -> Found:
    for entry in _entries(files, tally):
        content = entry.content(config.max_file_bytes, tally)
        if content is None:
            continue
        helpers, limits = entry.around.helpers, (config.min_side, config.max_picture_bytes)
        try:
            found = helpers.call(pictures_of_pdf, config.seconds, content, limits)
        except RefusedError as refused:
            is_locked = "password" in str(refused).lower()
            why = "it needs a password" if is_locked else str(refused)
            tally.set_aside("encrypted_files" if is_locked else refused.kind, entry.place, why)
            continue
        tally.counts["pages"] += found.pages
        for number, note in found.notes:
            tally.set_aside("unreadable_pictures", f"{entry.place}, page {number}", note)
        for picture in found.pictures:
            name = f"page {picture.page}, picture {picture.number}"
            texts = tuple(PageText(text, kind) for text, kind in picture.texts)
            license = entry.license_nearby()
            mention = Mention(texts, entry.name, name, f"{entry.place}, {name}", source.title, license)
            if wanted(mention):
                yield mention, picture.data


def fingerprint(sources: Iterable[PictureSource], folder: Path, cache: Path, progress: Progress | None) -> list[object]:
    """What the pictures of sources depend on: hashes of all pages and pictures."""
    from bessemer.data.sources.io.paths import ContentFingerprints

    return [opened(source, folder).fingerprint(ContentFingerprints(cache, progress)) for source in sources]
