"""Source `warc`: web archives. Pages of `response` and `resource` records, and the text of `conversion` records (WET).

The file is cut into records here, on bounded memory and with damage passed over; fastwarc parses what is inside one.
In the usual archive each record is a compressed member of its own, so reading goes on with a seek.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from bessemer.data.sources.config import FetchingSource, WarcSource
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.formats.pages import Extraction, page_document, urlsplit_host
from bessemer.data.sources.http.page_store import OPT_OUT_FIELD
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.cutting import Marks
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument

_LONGEST_HEADER = 1 << 16
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,15})[ \t]*\r?$", re.I | re.M)
_TYPE = re.compile(rb"^warc-type:[ \t]*([a-z]+)", re.I | re.M)
_BEGINNING = b"WARC/"
_WANTED = {b"response", b"resource", b"conversion"}
_WANTED_TYPES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_PAGE_TYPES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Warc:
    """Web archives: .warc and .wet."""

    max_document_bytes: int
    extraction: Extraction = field(default_factory=Extraction)
    #: Name documents by their address instead of by their record, where each is in the archive once.
    by_url: bool = False
    known: str = ".warc/.wet, plain or with .gz or .zst"
    small: bool = False
    archives: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".warc", ".wet"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        with _Records(entry, start, self.max_document_bytes, tally) as records:
            for position, place, record in records:
                try:
                    document = self._document(record, place, entry.license, tally)
                except (ValueError, OSError) as error:
                    tally.set_aside("damaged_records", place, str(error))
                    continue
                if document is not None:
                    yield position, document

    def _document(self, raw: bytes, place: str, license: str | None, tally: Tally) -> Document | None:
        record = next(iter(ArchiveIterator(io.BytesIO(raw), record_types=_WANTED_TYPES, auto_decode="all")), None)
        if record is None:
            tally.set_aside("damaged_records", place, "a record whose header cannot be read")
            return None
        url = encodable(record.headers.get("WARC-Target-URI") or "").strip("<>") or None
        locator = url if self.by_url and url else encodable(record.record_id or f"{url} {record.headers.get('WARC-Date')}")
        metadata = {"record": encodable(record.record_id or ""), "date": encodable(record.headers.get("WARC-Date") or "")}
        is_text = record.record_type == WarcRecordType.conversion
        kind, headers = ("", []) if is_text else _served(record)
        if not is_text and kind not in _PAGE_TYPES:
            tally.counts["records_that_are_not_pages"] += 1
            return None
        content = record.reader.read(self.max_document_bytes + 1)
        if len(content) > self.max_document_bytes:
            tally.set_aside("too_large", place, f"over {self.max_document_bytes:,} bytes")
            return None
        if is_text:
            if language := record.headers.get("WARC-Identified-Content-Language"):
                metadata["identified_language"] = encodable(language)
            text, group = content.decode("utf-8", errors="replace").strip(), urlsplit_host(url) if url else None
            return Document(locator, text, url=url, license=license, group=group, metadata=metadata)
        charset = record.http_charset if record.is_http_parsed else None
        document = page_document(
            content,
            locator,
            place,
            self.extraction,
            tally,
            url=url,
            charset=charset,
            headers=headers,
            license=license,
            metadata=metadata,
        )
        if document is not None and (said := record.headers.get(OPT_OUT_FIELD)):
            on_page = document.metadata.get("opt_out")
            if on_page is None:
                tally.counts["opted_out"] += 1
            signs = ", ".join(filter(None, (on_page, encodable(said))))
            document = dataclasses.replace(document, metadata=document.metadata | {"opt_out": signs})
        return document


def warc_format(settings: WarcSource | FetchingSource, *, by_url: bool = False) -> Warc:
    """How the pages of an archive, or of a store of fetched pages, are read. by_url: documents are named by their address."""
    return Warc(settings.max_document_bytes, Extraction(settings.extractor), by_url)


def open_warc(settings: WarcSource, folder: Path, cache: Path) -> FileSource:
    """The source `warc` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, warc_format(settings))


def _served(record: WarcRecord) -> tuple[str, list[tuple[str, str]]]:
    """The media type of what a record holds, and the headers with which it was served."""
    if record.record_type == WarcRecordType.resource or not record.is_http_parsed:
        return (record.headers.get("Content-Type") or "").split(";")[0].strip().lower(), []
    if record.http_headers.status_code != 200:
        return "", []
    headers = [(encodable(name), encodable(value)) for name, value in record.http_headers.items()]
    return (record.http_content_type or "").lower(), headers


class _Records:
    """The wanted records of an archive: the position behind each, its place for notes, its bytes."""

    def __init__(self, entry: Entry, start: int, max_document_bytes: int, tally: Tally) -> None:
        self._entry = entry
        self._tally = tally
        # compressed bodies and headers around what will be measured
        self._limit = 4 * max_document_bytes + (1 << 20)
        self._marks = Marks(entry, start)
        self._stream = self._marks.stream

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[tuple[int, str, bytes]]:
        lost = False
        while True:
            begin = self._stream.tell()
            line = self._stream.readline(_LONGEST_HEADER)
            if not line:
                if not self._pass_damage():
                    return
                continue
            if not line.startswith(_BEGINNING):
                if line.strip() and not lost:
                    lost = True
                    where = f"{self._entry.place}: {self._marks.where(begin)}"
                    self._tally.set_aside("damaged_records", where, "no record begins here")
                continue
            lost = False
            is_new, place = self._marks.begins(begin), f"{self._entry.place}: {self._marks.where(begin)}"
            header, length, kind = self._header(line)
            if length is None or (not self._stream.compressed and begin + length > self._entry.size_bytes):
                self._tally.set_aside("damaged_records", place, "a header without a true length")
                lost = True
            elif not is_new or kind not in _WANTED:
                self._stream.skip(length)
            elif length > self._limit:
                self._tally.set_aside("too_large", place, f"a record of {length:,} bytes")
                self._stream.skip(length)
            else:
                block = self._stream.read(length)
                end = self._stream.tell()
                if len(block) < length or not self._is_sound(end):
                    self._tally.set_aside("damaged_records", place, "cut off or damaged")
                else:
                    yield self._marks.behind(end), place, header + block + b"\r\n\r\n"

    def _header(self, line: bytes) -> tuple[bytes, int | None, bytes]:
        lines, size = [line], len(line)
        while (line := self._stream.readline(_LONGEST_HEADER)) and size < _LONGEST_HEADER:
            lines.append(line)
            size += len(line)
            if line in (b"\r\n", b"\n"):
                header = b"".join(lines)
                length, kind = _LENGTH.search(header), _TYPE.search(header)
                return header, int(length[1]) if length else None, kind[1].lower() if kind else b""
        return b"", None, b""

    def _is_sound(self, end: int) -> bool:
        """Whether the bytes up to `end` may be trusted: the member's checksum, which follows, decides."""
        if not self._stream.compressed or end <= self._stream.verified:
            return True
        if self._stream.peek(4)[:4] == b"\r\n\r\n":
            self._stream.read(4)
        # reads on to the member's end, unless it holds more records
        self._stream.peek(1)
        return self._stream.damage is None

    def _pass_damage(self) -> bool:
        """At the end: note damage, and go on behind it where the archive has more members."""
        damage = self._stream.damage
        if damage is None:
            if self._stream.tell() == 0:
                self._tally.set_aside("empty_files", self._entry.place, "it is empty")
            return False
        where = self._stream.tell()
        went_on = self._stream.go_on()
        kind = "damaged_members" if went_on else damage.kind
        self._tally.set_aside(kind, self._entry.place, f"{damage.why}; behind byte {where:,} of what it holds")
        return went_on
