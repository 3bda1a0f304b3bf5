"""Web archives: the source `warc`, and the store of fetched pages that crawls write.

The source reads the pages of `response` and `resource` records, and the text of `conversion` records (WET). The file is cut
into records here, on bounded memory and with damage passed over; fastwarc parses each one. In the usual archive each record is
a compressed member of its own, so reading resumes with a seek.

The store is WARC files and a journal of the outcome of every address, so that a killed crawl resumes. A page counts when its
line stands in the journal. The line gives the length of its WARC file at that time; on opening, anything behind it is cut off.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from bessemer.data.sources.html import PageFormat, urlsplit_host
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.fetch import Response
from bessemer.data.sources.io.file_source import Marks
from bessemer.data.sources.registry import FetchingSource, WarcSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, encodable

_JOURNAL, _COMPLETE = "journal.jsonl", "complete"
_FILE_BYTES = 512 << 20
#: The field in which a record keeps what its host said against training, for the reader of the WARC.
OPT_OUT_FIELD = "Bessemer-Opt-Out"


class PageStore:
    """A folder of fetched pages. One process writes, from any number of threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        #: What became of each address: `page`, or the kind of what went wrong, and why.
        self.outcomes: dict[str, tuple[str, str]] = {}
        lengths: dict[str, int] = {}
        for line in self._journal_lines():
            if self.is_complete or not _may_heal(line["outcome"]):
                self.outcomes[line["url"]] = (line["outcome"], line.get("why", ""))
            if "file" in line:
                lengths[line["file"]] = max(lengths.get(line["file"], 0), line["end"])
        for path in self.folder.glob("pages-*.warc.gz"):
            with path.open("r+b") as stream:
                stream.truncate(lengths.get(path.name, 0))
        self._journal = (folder / _JOURNAL).open("ab")

    def _journal_lines(self) -> list[dict[str, Any]]:
        lines, length = _journal(self.folder)
        path = self.folder / _JOURNAL
        if path.exists() and path.stat().st_size > length:
            # a killed run left half a line
            with path.open("r+b") as stream:
                stream.truncate(length)
        return lines

    @property
    def is_complete(self) -> bool:
        """Whether every address has an outcome."""
        return (self.folder / _COMPLETE).exists()

    def complete(self) -> None:
        """Note that every address has an outcome; not where no page came, since the network may have been down."""
        if self._files():
            (self.folder / _COMPLETE).touch()

    def add_page(self, url: str, answer: Response, opt_out: str | None) -> None:
        """Keep a page under its address before redirects."""
        self.add_member(url, gzip.compress(_record(url, answer, opt_out), 6, mtime=0))

    def add_member(self, url: str, member: bytes) -> None:
        """Keep a record as the whole gzip member that it is."""
        with self._lock:
            path = self._file()
            with path.open("ab") as stream:
                stream.write(member)
                end = stream.tell()
            self._note({"url": url, "outcome": "page", "file": path.name, "end": end})

    def add_failure(self, url: str, kind: str, why: str) -> None:
        """Note that an address brought no page."""
        with self._lock:
            self._note({"url": url, "outcome": kind, "why": why})

    def _note(self, line: dict[str, Any]) -> None:
        self.outcomes[line["url"]] = (line["outcome"], line.get("why", ""))
        self._journal.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._journal.flush()

    def _file(self) -> Path:
        files = self._files()
        if files and files[-1].stat().st_size < _FILE_BYTES:
            return files[-1]
        return self.folder / f"pages-{len(files):05d}.warc.gz"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("pages-*.warc.gz"))

    def units(self) -> list[Unit]:
        """The WARC files."""
        return [Unit(path.name, path.stat().st_size, ((path.name, path),)) for path in self._files()]

    def failures(self) -> Counter[str]:
        """Numbers of addresses without a page, by kind of failure."""
        return Counter(kind for kind, _ in self.outcomes.values() if kind != "page")

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def _journal(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they are."""
    path = folder / _JOURNAL
    content = path.read_bytes() if path.exists() else b""
    length = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:length].splitlines()], length


def failures_in(folder: Path) -> dict[str, tuple[str, str]]:
    """The addresses that brought no page, with the kind and the reason, in a store that is not being written."""
    outcomes = {line["url"]: (line["outcome"], line.get("why", "")) for line in _journal(folder)[0]}
    return {url: outcome for url, outcome in outcomes.items() if outcome[0] != "page"}


def _may_heal(outcome: str) -> bool:
    """Whether a failure may be the network's or a busy server's, so that a later run tries again."""
    return outcome in ("unreachable", "timed_out", "broken_answers", "status_429") or outcome.startswith("status_5")


def _record(url: str, answer: Response, opt_out: str | None) -> bytes:
    """A WARC/1.1 response record; the body stands in it as it was expanded, so the headers about its coding go."""
    dropped = ("content-encoding", "transfer-encoding", "content-length", "connection")
    headers = [(name, value) for name, value in answer.headers if name.lower() not in dropped]
    head = f"HTTP/1.1 {answer.status} OK\r\n" + "".join(f"{name}: {_one_line(value)}\r\n" for name, value in headers)
    block = head.encode("latin-1", errors="replace") + f"Content-Length: {len(answer.body)}\r\n\r\n".encode() + answer.body
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid4()}>",
        "WARC-Date": now,
        "WARC-Target-URI": url,
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(block)),
    }
    if opt_out:
        fields[OPT_OUT_FIELD] = opt_out
    named = "".join(f"{name}: {_one_line(value)}\r\n" for name, value in fields.items())
    return b"WARC/1.1\r\n" + named.encode() + b"\r\n" + block + b"\r\n\r\n"


def _one_line(value: str) -> str:
    return " ".join(value.split())


_LONGEST_HEADER = 1 << 16
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,15})[ \t]*\r?$", re.I | re.M)
_TYPE = re.compile(rb"^warc-type:[ \t]*([a-z]+)", re.I | re.M)
_BEGINNING = b"WARC/"
_WANTED = {b"response", b"resource", b"conversion"}
_WANTED_TYPES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_PAGE_TYPES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Warc(PageFormat):
    """Web archives: .warc and .wet. by_url: documents are named by their address, where each is in the archive once."""

    settings: WarcSource | FetchingSource
    by_url: bool = False
    known: ClassVar[str] = ".warc/.wet, plain or with .gz or .zst"
    archives: ClassVar[tuple[str, ...]] = ()

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".warc", ".wet"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        with closing(_Records(entry, start, self.settings.max_document_bytes, tally)) as records:
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
        content = record.reader.read(self.settings.max_document_bytes + 1)
        if len(content) > self.settings.max_document_bytes:
            tally.set_aside("too_large", place, f"over {self.settings.max_document_bytes:,} bytes")
            return None
        if is_text:
            if language := record.headers.get("WARC-Identified-Content-Language"):
                metadata["identified_language"] = encodable(language)
            text, group = content.decode("utf-8", errors="replace").strip(), urlsplit_host(url) if url else None
            return Document(locator, text, url=url, license=license, group=group, metadata=metadata)
        charset = record.http_charset if record.is_http_parsed else None
        document = self.page_document(
            content, locator, place, tally, url=url, charset=charset, headers=headers, license=license, metadata=metadata
        )
        if document is not None and (said := record.headers.get(OPT_OUT_FIELD)):
            on_page = document.metadata.get("opt_out")
            if on_page is None:
                tally.counts["opted_out"] += 1
            signs = ", ".join(filter(None, (on_page, encodable(said))))
            document = dataclasses.replace(document, metadata=document.metadata | {"opt_out": signs})
        return document


open_warc = Warc.open


@dataclass(frozen=True)
class ServedRecord:
    """What an archive says of something that was served, without its content. kind: its media type. opt_out: what its host said
    against training."""

    url: str
    kind: str
    place: str
    charset: str | None
    headers: list[tuple[str, str]]
    opt_out: str | None


def served_records(
    entry: Entry, wants: Callable[[ServedRecord], bool], limit: int, tally: Tally
) -> Iterator[tuple[ServedRecord, bytes]]:
    """What a WARC file holds under addresses, pages or not, with the content of those that are wanted. limit: the most bytes of
    a content; larger ones, and damaged records, are set aside."""
    with closing(_Records(entry, 0, limit, tally)) as records:
        for _, place, raw in records:
            try:
                types = WarcRecordType.response | WarcRecordType.resource
                record = next(iter(ArchiveIterator(io.BytesIO(raw), record_types=types, auto_decode="all")), None)
                url = encodable(record.headers.get("WARC-Target-URI") or "").strip("<>") if record is not None else ""
                if record is None or not url:
                    continue
                kind, headers = _served(record)
                charset = record.http_charset if record.is_http_parsed else None
                said = record.headers.get(OPT_OUT_FIELD)
                served = ServedRecord(url, kind, place, charset, headers, encodable(said) if said else None)
                if not kind or not wants(served):
                    continue
                content = record.reader.read(limit + 1)
            except (ValueError, OSError) as error:
                tally.set_aside("damaged_records", place, str(error))
                continue
            if len(content) > limit:
                tally.set_aside("too_large", place, f"over {limit:,} bytes")
            else:
                yield served, content


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
        # room for headers and for compressed bodies, whose expanded size is checked later
        self._limit = 4 * max_document_bytes + (1 << 20)
        self._marks = Marks(entry, start)
        self._stream = self._marks.stream

    def close(self) -> None:
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
        # reads to the member's end, and so its checksum, unless it holds more records
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
