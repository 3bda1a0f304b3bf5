"""Source of files in one format: single, compressed, in folders and in archives; cut into lines, fragments and records.

A fragment that is too long is read over, never held. Between fragments are positions from which reading resumes with a seek,
also in compressed files of many members. Records (JSON objects, rows, dicts of a user's function) become documents; JSON
parsing is bounded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress
from bessemer.data.limited import Helpers
from bessemer.data.sources.io.archives import ARCHIVES, Entry, Surroundings, entries, is_archive
from bessemer.data.sources.io.paths import ContentFingerprints, find_files, other_files, uncompressed_name, units_of
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, encodable

_BLOCK = 1 << 18
#: A position is an offset in the file times this, plus a number of fragments: 63 bits hold 512 GB and 16 million fragments.
_FRAGMENTS = 1 << 24


class Marks:
    """A file on disk that is read fragment by fragment from a position on, and the positions behind its fragments.

    In a plain file a position is the byte behind a fragment. In a compressed one it is where the member (the gzip member, the
    frame, the stream) lies in the file in which the fragment begins, and how many fragments began in that member up to it.
    """

    def __init__(self, entry: Entry, position: int) -> None:
        self._first, self._skipped = divmod(position, _FRAGMENTS)
        self._is_compressed = entry.is_compressed
        self.stream: Stream = entry.open(member=self._first) if self._is_compressed else entry.open(self._first)
        self._member = self._first
        self._number = 0

    def begins(self, offset: int) -> bool:
        """Note that a fragment begins at `offset` of the stream; whether it lies behind the position that was started from. To
        be called for every fragment, in order."""
        if not self._is_compressed:
            return True
        member = self.stream.member_at(offset)[1]
        self._number = self._number + 1 if member == self._member else 1
        self._member = member
        return member != self._first or self._number > self._skipped

    def behind(self, end: int) -> int:
        """The position behind the fragment that began last, which ends at `end` of the stream."""
        if not self._is_compressed:
            return end * _FRAGMENTS
        # fragments beyond the most would be read twice, with equal ids
        return self._member * _FRAGMENTS + min(self._number, _FRAGMENTS - 1)

    def where(self, offset: int) -> str:
        """The place at `offset` of the stream, for notes: a byte of the file, wherever reading began."""
        if self._is_compressed:
            return f"in the member at byte {self.stream.member_at(offset)[1]:,}"
        return f"byte {offset:,}"


def bounded_lines(stream: Stream, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The lines of a stream from where it stands: where each begins, where it ends, and its bytes with the line end. A line
    over `limit` bytes is None: read over, never held."""
    offset = stream.tell()
    while line := stream.readline(limit + 1):
        end = offset + len(line)
        if len(line) > limit and not line.endswith(b"\n"):
            while rest := stream.readline(_BLOCK):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield offset, end, None
        elif len(line) > limit:
            yield offset, end, None
        else:
            yield offset, end, line
        offset = end


def fragments(stream: Stream, opening: bytes, closing: bytes, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The fragments of a stream from `opening` to the next `closing`, both included: begin, end, bytes. A fragment over `limit`
    bytes is None: read over, never held. What the stream's end cuts off is not yielded."""
    held = bytearray()
    # the offset of held[0]
    base = stream.tell()
    inside = too_long = False
    begin = searched = 0
    while True:
        wanted = closing if inside else opening
        at = held.find(wanted, searched)
        if at < 0:
            block = stream.read1(_BLOCK)
            if not block:
                return
            keep = max(len(wanted) - 1, 0)
            if not inside or too_long or len(held) > limit:
                too_long = inside
                drop = max(len(held) - keep, 0)
                del held[:drop]
                base += drop
            searched = max(len(held) - keep, 0)
            held += block
        elif not inside:
            del held[:at]
            base += at
            begin, inside, too_long, searched = base, True, False, len(opening)
        else:
            end = base + at + len(closing)
            yield begin, end, None if too_long or end - begin > limit else bytes(held[: at + len(closing)])
            del held[: at + len(closing)]
            base, inside, searched = end, False, 0


#: The longest record that is held in memory.
LONGEST_RECORD = 32 << 20

_RECORD_FIELDS = ("url", "license", "language")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def record_document(record: Mapping[str, Any], place: str, *, default_license: str | None = None) -> Document:
    """The document of a record (a JSONL line, or a dict that a user's function yields).

    `text` is needed; `id`, `url`, `license`, `language` and `metadata` are taken where present, and other plain
    values join the metadata. Raises SourceError naming `place` when there is no text.
    """
    text = record.get("text")
    if not isinstance(text, str):
        raise SourceError(f"{place}: a record needs a 'text' that is a string, got {type(text).__name__}")
    given = record.get("metadata")
    metadata = dict(given) if isinstance(given, Mapping) else {}
    metadata |= {key: value for key, value in record.items() if key not in ("id", "text", "metadata", *_RECORD_FIELDS)}
    plain = {
        encodable(str(key)): encodable(str(value)) for key, value in metadata.items() if isinstance(value, (str, int, float))
    }
    identity = None if record.get("id") is None else encodable(f"id:{record['id']}")
    fields: dict[str, Any] = {name: encodable(str(record[name])) for name in _RECORD_FIELDS if record.get(name) is not None}
    text = encodable(text)
    return Document(
        record_locator(identity, text),
        text,
        group=plain.get("package", identity),
        metadata=plain,
        **({"license": default_license} | fields),
    )


def record_locator(name: str | None, text: str) -> str:
    """The locator of a record: its name, where it has one, and its text.

    A name alone is not enough: shards that are each numbered from 0, and chunks that bear their document's id, repeat names.
    A file's name has no part in it, so that the same records spread over any number of files give the same documents.
    """
    return f"{name or 'text'}:{hash_bytes(text.encode())}"


def json_lines(
    entry: Entry, start: int, tally: Tally, limit: int = LONGEST_RECORD
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The objects of a file of JSON lines: the byte offset behind each, the object, its place for notes. A line that is too
    long, not JSON, nested too deeply or not an object is set aside."""
    with entry.open_text(start, tally) as stream:
        for begin, end, line in bounded_lines(stream, limit):
            place = f"{entry.place}: byte {begin}"
            if line is None:
                tally.set_aside("too_large", place, f"a line of {end - begin:,} bytes")
                continue
            text = decoded(line.removeprefix(_BYTE_ORDER_MARK) if begin == 0 else line, tally)
            if not text.strip():
                continue
            if not line.endswith(b"\n") and stream.damage is not None:
                # a line cut off by damage is counted once, as damage
                break
            try:
                record = parse_json(text)
            except ValueError as error:
                tally.set_aside("bad_records", place, f"this line is not JSON ({error})")
                continue
            if isinstance(record, dict):
                yield end, record, place
            else:
                tally.set_aside("bad_records", place, f"a record needs to be a JSON object, got {type(record).__name__}")
        note_end(entry, stream.damage, stream.tell(), tally)


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError, also for one nested too deeply or a number of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def note_end(entry: Entry, damage: Any, size: int, tally: Tally) -> None:
    """Count what a reader finds out at the end of a file: that it was damaged, or empty."""
    if damage is not None:
        tally.set_aside(damage.kind, entry.place, f"{damage.why}; read to byte {size:,}")
    elif size == 0:
        tally.set_aside("empty_files", entry.place, "it is empty")


def decoded(line: bytes, tally: Tally) -> str:
    """A line as text, with its end as a single newline; bytes that are not UTF-8 become U+FFFD and are counted."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        tally.counts["undecodable_bytes"] += len(line) - len(line.decode("utf-8", errors="ignore").encode())
    return text[:-2] + "\n" if text.endswith("\r\n") else text


#: A position in a unit of several files is the file's number times this plus the position inside the file.
_INNER = 1 << 40


class Format(Protocol):
    """How documents are found in one file. Implementations are frozen and can be pickled."""

    @property
    def known(self) -> str:
        """The kinds of file, as a user should read them in a message."""

    @property
    def small(self) -> bool:
        """Whether a file is one document or a few, so that many are read as one unit."""

    @property
    def archives(self) -> tuple[str, ...]:
        """Suffixes of archives whose members are read as files of this format."""

    def reads(self, name: str) -> bool:
        """Whether a file is of this format, by its name without the suffix of a compression."""

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        """The documents of a file behind the position `start`, each with the position behind it."""


@dataclass(frozen=True)
class FileSource:
    """The files that `paths` mean, relative to `folder`, in one format."""

    paths: tuple[str, ...]
    folder: Path
    format: Format
    license: str | None = None

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return units_of(self._files(), bundled=lambda name: self.format.small and not self._is_archive(name))

    def others(self) -> list[str]:
        """The files in the folders that the settings name which are of a kind that is not read."""
        return other_files(list(self.paths), self.folder, self._reads)

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        alone = len(unit.files) == 1 and not self._is_archive(unit.files[0][0])
        first, inner = (0, start) if alone else divmod(start, _INNER)
        if start == 0:
            tally.bytes += unit.size_bytes
        with closing(Helpers()) as helpers:
            around = Surroundings(self.license, helpers=helpers)
            for number, entry in entries(unit, first, self.format.reads, self.format.archives, around, tally):
                begin = inner if number == first else 0
                tally.files += begin == 0
                for position, document in self._documents(entry, begin, tally):
                    yield position if alone else number * _INNER + position, document

    def _documents(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        documents = self.format.read(entry, start, tally)
        nul_characters = 0
        while True:
            try:
                item = next(documents, None)
            except BessemerError:
                raise
            except Exception as error:  # a file that makes a parser stumble must not end the run, whatever it raises
                tally.set_aside("unreadable_files", entry.place, f"reading failed: {type(error).__name__}: {error}")
                break
            if item is None:
                break
            position, document = item
            if "\0" in document.text:
                nul_characters += document.text.count("\0")
                document = dataclasses.replace(document, text=document.text.replace("\0", ""))
            if document.text.strip():
                yield position, document
        if nul_characters:
            tally.counts["nul_characters"] += nul_characters
            tally.set_aside("files_with_nul_characters", entry.place, f"{nul_characters} NUL characters were left out")

    def fingerprint(self, fingerprints: ContentFingerprints | None = None) -> Any:
        files = self._files()
        contents = (fingerprints or ContentFingerprints()).of(files.values())
        return sorted([self._stable_name(name), content] for name, content in zip(files, contents, strict=True))

    def _stable_name(self, name: str) -> str:
        """The part of a file's name on which its documents depend."""
        return name

    def _files(self) -> dict[str, Place]:
        return find_files(list(self.paths), self.folder, self._reads, self.format.known)

    def _is_archive(self, name: str) -> bool:
        return is_archive(name, self.format.archives)

    def _reads(self, name: str) -> bool:
        return self._is_archive(name) or self.format.reads(uncompressed_name(name))


@dataclass(frozen=True)
class SettingsFormat:
    """A `Format` that holds the settings of its source. `known`, `small` and `archives` as there."""

    settings: Any
    known: ClassVar[str]
    small: ClassVar[bool] = False
    archives: ClassVar[tuple[str, ...]] = ARCHIVES

    @classmethod
    def open(cls, settings: Any, folder: Path, cache: Path) -> FileSource:
        """The files that the settings name, relative to `folder`, in this format."""
        return FileSource(tuple(settings.paths), folder, cls(settings), settings.license)

    def reads(self, name: str) -> bool:
        raise NotImplementedError

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        raise NotImplementedError
