"""Source of files in one format: single, compressed, in folders and in archives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bessemer.core.errors import BessemerError
from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress
from bessemer.data.limited import Helpers
from bessemer.data.sources.config import PathsSource
from bessemer.data.sources.document import Tally
from bessemer.data.sources.io.archives import Entry, Surroundings, entries, is_archive
from bessemer.data.sources.io.paths import ContentFingerprints, find_files, other_files, units_of
from bessemer.data.sources.source import PositionedDocument, Unit
from bessemer.data.sources.suffixes import uncompressed_name

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
        with Helpers() as helpers:
            around = Surroundings(self.license, helpers=helpers)
            for number, entry in entries(unit, first, self.format.reads, self.format.archives, around, tally):
                begin = inner if number == first else 0
                tally.files += begin == 0
                for position, document in self._documents(entry, begin, tally):
                    yield position if alone else number * _INNER + position, document

    def _documents(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        found = self.format.read(entry, start, tally)
        nul_characters = 0
        while True:
            try:
                item = next(found, None)
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
        """What of a file's name shows in its documents."""
        return name

    def _files(self) -> dict[str, Place]:
        return find_files(list(self.paths), self.folder, self._reads, self.format.known)

    def _is_archive(self, name: str) -> bool:
        return is_archive(name, self.format.archives)

    def _reads(self, name: str) -> bool:
        return self._is_archive(name) or self.format.reads(uncompressed_name(name))


def file_source(settings: PathsSource, folder: Path, format: Format) -> FileSource:
    """The files that the settings name, relative to `folder`, in one format."""
    return FileSource(tuple(settings.paths), folder, format, settings.license)
