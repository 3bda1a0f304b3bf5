"""Office files and PDF as documents of an index: on disk, compressed, or in archives, with limits, each read once.

A file is read in a process with limits, so that one that hangs or crashes its parser costs itself alone. What was read is
kept beside the index under the hash of the file's bytes: an update reads only what has changed.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

from bessemer.core.config import setting
from bessemer.core.environment import install_advice, is_installed
from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import read_json, write_json
from bessemer.data.limited import RefusedError
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import FileSource, SettingsFormat
from bessemer.data.sources.registry import WholeFilesSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally
from bessemer.retrieval.chunks import Region
from bessemer.retrieval.reading.docx import read_docx
from bessemer.retrieval.reading.markdown import ReadText
from bessemer.retrieval.reading.pdf import read_pdf
from bessemer.retrieval.reading.pptx import read_pptx
from bessemer.retrieval.reading.xlsx import read_xlsx

#: To be raised where the readers give another text for the same file.
_VERSION = 1
#: What the parts of an office file may expand to: this, or this many times its size.
_MOST_BYTES, _FREE_BYTES, _MOST_EXPANSION = 512 << 20, 64 << 20, 250
#: First bytes of Microsoft's older formats, and of encrypted files of the newer ones.
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_STREAM = "EncryptedPackage".encode("utf-16-le")


@dataclass(frozen=True)
class Reader:
    """Reads files of a suffix. module: the library that it needs, `` for none; part: what the names of the parts begin with."""

    function: Callable[[bytes, int], ReadText]
    module: str
    part: str = ""


_DOCX, _PPTX = Reader(read_docx, "docx", "word/"), Reader(read_pptx, "pptx", "ppt/")
_XLSX = Reader(read_xlsx, "", "xl/")
#: Suffix → reader.
READERS = {
    ".docx": _DOCX,
    ".pptx": _PPTX,
    ".pptm": _PPTX,
    ".xlsx": _XLSX,
    ".xlsm": _XLSX,
    ".pdf": Reader(read_pdf, "pypdfium2"),
}


class OfficeSource(WholeFilesSource):
    """DOCX, PPTX, XLSX and PDF files."""

    source: Literal["office"] = setting("office", "kind of source")
    seconds: float = setting(300.0, "longest processor time for one file", unit="seconds", gt=0)


@dataclass(frozen=True, slots=True)
class PlacedDocument(Document):
    """A document whose parts have places in its file. kind: the file's suffix without the dot."""

    regions: tuple[Region, ...] = ()
    kind: str = ""


@dataclass
class ReadFiles:
    """What was read, in a folder. `forget_others` deletes what was not asked for."""

    folder: Path
    _used: set[str] = field(default_factory=set)

    def get(self, key: str) -> ReadText | None:
        """What is kept under a key; None where nothing is, or it is damaged."""
        self._used.add(key)
        try:
            return ReadText.from_json(read_json(self.folder / f"{key}.json"))
        except (ArtefactError, OSError, KeyError, TypeError, ValueError):
            return None

    def put(self, key: str, text: ReadText) -> None:
        """Keep a text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{key}.json", text.as_json(), compact=True)

    def forget_others(self) -> None:
        """Delete what was not asked for since this object was made."""
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            if path.stem not in self._used:
                path.unlink(missing_ok=True)


def is_office_file(name: str) -> bool:
    """Whether a file is read here, by its name without the suffix of a compression."""
    path = PurePosixPath(name)
    # while a file is open, its program keeps another one beside it
    return path.suffix.lower() in READERS and not path.name.startswith("~$")


@dataclass(frozen=True)
class OfficeFiles(SettingsFormat):
    """One document a file."""

    settings: OfficeSource
    read_files: ReadFiles
    known: ClassVar[str] = "/".join(READERS)
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return is_office_file(name)

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        suffix = PurePosixPath(entry.name).suffix.lower()
        reader = READERS[suffix]
        if start:
            return
        if reader.module and not is_installed(reader.module):
            tally.set_aside("missing_packages", entry.place, install_advice(reader.module))
            return
        data = entry.content(self.settings.max_file_bytes, tally)
        if data is None:
            return
        try:
            text = self._text(data, reader, entry)
        except RefusedError as refused:
            if "password" in str(refused).lower():
                tally.set_aside("encrypted_files", entry.place, "it needs a password; save it without one")
            else:
                reason = str(refused).removeprefix("ValueError: ").removeprefix("PdfiumError: ")
                tally.set_aside(refused.kind, entry.place, reason)
            return
        if not text.text.strip():
            scanned = "; scanned? Recognise its text first, as `ocrmypdf` does" if suffix == ".pdf" else ""
            tally.set_aside("files_without_text", entry.place, f"no text is in it{scanned}")
            return
        for note in text.notes:
            tally.set_aside("incomplete_files", entry.place, note)
        yield (
            1,
            PlacedDocument(
                entry.name, text.text, text.title, license=entry.license, regions=text.regions, kind=suffix.removeprefix(".")
            ),
        )

    def _text(self, data: bytes, reader: Reader, entry: Entry) -> ReadText:
        """The text of a file, read now or before. Raises RefusedError where it cannot be read."""
        has_tables = is_installed("pdfplumber")
        parameters = [reader.function.__name__, _VERSION, self.settings.max_document_bytes, has_tables]
        key = hash_bytes(data, repr(parameters).encode())
        if (known := self.read_files.get(key)) is not None:
            return known
        if reader.part:
            refuse_unsafe(data, reader.part)
        text: ReadText = entry.around.helpers.call(
            reader.function, self.settings.seconds, data, self.settings.max_document_bytes
        )
        self.read_files.put(key, text)
        return text


def open_office(settings: OfficeSource, folder: Path, read_files: ReadFiles) -> FileSource:
    """The files that the settings name, relative to `folder`."""
    return FileSource(tuple(settings.paths), folder, OfficeFiles(settings, read_files), settings.license)


def refuse_unsafe(data: bytes, part: str) -> None:
    """Raise RefusedError for what is no office file, is encrypted, or expands too far. part: what the names of its parts begin
    with."""
    if data.startswith(_OLE):
        if _ENCRYPTED_STREAM in data:
            raise RefusedError("encrypted_files", "it needs a password")
        raise RefusedError("unreadable_files", "it is in an older format under a new name; save it in the new one")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            members = package.infolist()
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError) as error:
        raise RefusedError("damaged_files", f"it is damaged ({error})") from None
    # no reader of zips gives more bytes than the directory says
    size = sum(member.file_size for member in members)
    if size > _MOST_BYTES or size > max(_FREE_BYTES, _MOST_EXPANSION * len(data)):
        raise RefusedError("decompression_bombs", f"it expands from {len(data):,} to {size:,} bytes")
    if not any(member.filename.startswith(part) for member in members):
        raise RefusedError("unreadable_files", "it is a zip archive and no office file of its suffix")
