"""Source `files`: `.txt`, `.md` and `.jsonl`, plain, compressed, or in archives.

A text file is one document, or several cut at blank lines where it is long; each is named by the file's path below
the source's root and its byte offset. A JSONL record is named by its `id`, where it has one, and its text, so that
the same records spread over any number of files give the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.data.sources.config import FilesSource
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.formats.records import decoded, json_lines, note_end, record_document
from bessemer.data.sources.io.archives import ARCHIVES, Entry, is_archive
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.io.tree import FileSource
from bessemer.data.sources.source import PositionedDocument
from bessemer.data.sources.suffixes import COMPRESSIONS, uncompressed_name

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl",)
#: A paragraph stays whole, unless it is so long that it may be no text at all; then it is cut here.
_LONGEST_PARAGRAPH = 16 << 20
#: Of a record without a text: how many of its fields are named.
_NAMED_FIELDS = 20
_KNOWN = (
    "/".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))
    + f", plain, with {' or '.join(COMPRESSIONS)}, or in an archive such as .zip or .tar.gz"
)


@dataclass(frozen=True)
class TextFiles:
    """Text and JSONL."""

    max_document_bytes: int
    longest_paragraph: int = _LONGEST_PARAGRAPH
    known: str = _KNOWN
    small: bool = False
    archives: tuple[str, ...] = ARCHIVES

    def reads(self, name: str) -> bool:
        return _suffix(name) in TEXT_SUFFIXES + RECORD_SUFFIXES

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        replaced = tally.counts["undecodable_bytes"]
        if _suffix(entry.name) in TEXT_SUFFIXES:
            with entry.open_text(start, tally) as stream:
                yield from self._text_documents(stream, entry, start, tally)
                note_end(entry, stream.damage, stream.tell(), tally)
        else:
            for position, record, place in json_lines(entry, start, tally):
                try:
                    document = record_document(record, place, default_license=entry.license)
                except SourceError as error:
                    tally.set_aside("bad_records", place, str(error).removeprefix(f"{place}: ") + _instead_of_text(record))
                else:
                    yield position, document
        if (here := tally.counts["undecodable_bytes"] - replaced) > 0:
            tally.set_aside("files_with_undecodable_bytes", entry.place, f"{here} bytes are not UTF-8 and were replaced")

    def _text_documents(self, stream: Stream, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        """Cut at the last blank line before a document would be longer than `max_document_bytes`."""
        offset, pending_bytes = start, 0
        # whole paragraphs, their blank lines behind them
        pending: list[str] = []
        paragraph: list[str] = []
        paragraph_bytes = 0

        while line := stream.readline(self.longest_paragraph):
            while not line.endswith(b"\n") and (following := stream.peek(1)[:1]) and 0x80 <= following[0] < 0xC0:
                # the limit fell into a character
                line += stream.read(1)
            text = decoded(line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, tally)
            offset += len(line)
            paragraph.append(text)
            paragraph_bytes += len(line)
            if is_cut := paragraph_bytes >= self.longest_paragraph:
                tally.set_aside("cut_paragraphs", f"{entry.place}: byte {offset - paragraph_bytes}", "this paragraph was cut")
            if is_cut or not text.strip():
                if pending and pending_bytes + paragraph_bytes > self.max_document_bytes:
                    yield start + pending_bytes, _text_document(entry, start, pending)
                    start, pending, pending_bytes = start + pending_bytes, [], 0
                pending += paragraph
                pending_bytes += paragraph_bytes
                paragraph, paragraph_bytes = [], 0
        if pending and pending_bytes + paragraph_bytes > self.max_document_bytes:
            yield start + pending_bytes, _text_document(entry, start, pending)
            start, pending = start + pending_bytes, []
        if pending or paragraph:
            yield offset, _text_document(entry, start, pending + paragraph)


def _instead_of_text(record: Mapping[str, Any]) -> str:
    """What a record has that has no text, and the setting that names the field of the longest one, as the end of a message."""
    if "text" in record or not record:
        return ""
    fields = ", ".join(map(repr, list(record)[:_NAMED_FIELDS]))
    lengths = {name: len(value) for name, value in record.items() if isinstance(value, str)}
    longest = max(lengths, key=lambda name: lengths[name], default=None)
    remedy = "" if longest is None else f", and {{source: tables, columns: {{text: {longest}}}}} reads {longest!r}"
    return f"; it has {fields}{remedy}"


def _text_document(entry: Entry, start: int, lines: list[str]) -> Document:
    text = "".join(lines).strip("\n")
    metadata = {"file": entry.name, "offset": str(start)}
    return Document(f"{entry.name}#{start}", text, license=entry.license, group=entry.name, metadata=metadata)


@dataclass(frozen=True)
class Files(FileSource):
    """The source `files`, whose fingerprint knows that records are not named after their files."""

    def _stable_name(self, name: str) -> str:
        return "" if not is_archive(name) and _suffix(uncompressed_name(name)) in RECORD_SUFFIXES else name


def open_files(settings: FilesSource, folder: Path, cache: Path) -> Files:
    """The source `files` over the paths of its settings, relative to `folder`."""
    return files_source(settings.paths, folder, settings.max_document_bytes, settings.license)


def files_source(paths: list[str], folder: Path, max_document_bytes: int, license: str | None = None) -> Files:
    """The source `files` over `paths`, relative to `folder`."""
    return Files(tuple(paths), folder, TextFiles(max_document_bytes), license)


def may_hold_records(paths: list[str], folder: Path) -> bool:
    """Whether any of the files is, or is an archive that may hold, JSONL."""
    units = files_source(paths, folder, max_document_bytes=1).units()
    return any(
        is_archive(name) or _suffix(uncompressed_name(name)) in RECORD_SUFFIXES for unit in units for name, _ in unit.files
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
