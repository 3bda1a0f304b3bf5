"""Entries of a unit: a plain file, a bundle of files, or an archive's members, read without unpacking; and their licences.

Nothing is ever written to disk. Members that only make sense on a disk, or that mean harm there (links, devices, names that
climb out of the archive), are set aside. A file's licence is that of the nearest LICENSE file in the folders above it.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Self, cast

from bessemer.core.errors import BessemerError
from bessemer.core.object_storage import Place
from bessemer.core.text_encoding import UTF8
from bessemer.data.limited import Helpers
from bessemer.data.sources.io.paths import uncompressed_name
from bessemer.data.sources.io.streams import Stream, broken_stream, open_stream, stream_of, text_of
from bessemer.data.sources.source import OTHER_ENCODING, Tally, Unit, encodable, license_of_text, stated_license

_LICENSE_FILE = re.compile(r"(?:un)?licen[cs]e(?:[-._].*)?|copying(?:[-._].*)?|(?:mit|apache|bsd)[-_]licen[cs]e.*", re.I)
_LARGEST = 200_000


def is_license_file(name: str) -> bool:
    """Whether a file states a licence, by its name without folders."""
    return _LICENSE_FILE.fullmatch(name) is not None and not name.endswith((".py", ".js", ".go", ".rs", ".c", ".h", ".java"))


@dataclass
class LicenseFiles:
    """The licences of an archive's or a tree's folders. An archive is looked through once, a tree folder by folder."""

    archive: tuple[str, Place] | None = None
    _by_folder: dict[str, str | None] = field(default_factory=dict)
    _is_scanned: bool = False

    def license_of(self, name: str, path: Place | None) -> str | None:
        """The licence that holds for the file `name`, which lies at `path` unless it is in the archive."""
        if self.archive is not None and not self._is_scanned:
            self._is_scanned = True
            self._scan(*self.archive)
        folder = posixpath.dirname(name)
        depth = name.count("/")
        for above in range(depth + 1):
            if path is not None and folder not in self._by_folder:
                self._by_folder[folder] = _license_in(path.parents[above])
            if known := self._by_folder.get(folder):
                return known
            folder = posixpath.dirname(folder)
        return None

    def _scan(self, name: str, path: Place) -> None:
        try:
            with path.open("rb") as file:
                is_zip = zipfile.is_zipfile(file)
                if is_zip:
                    with zipfile.ZipFile(file) as archive:
                        for info in archive.infolist():
                            if is_license_file(posixpath.basename(info.filename)):
                                with archive.open(info) as stream:
                                    self._note(info.filename, stream.read(_LARGEST))
            if not is_zip:
                with open_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]
                        wanted = member.isreg() and is_license_file(posixpath.basename(member.name))
                        if wanted and (content := tar.extractfile(member)) is not None:
                            self._note(member.name, content.read(_LARGEST))
        except BessemerError:
            raise
        except Exception:  # a damaged archive: what was found so far holds, and the reader of the members counts the damage
            return

    def _note(self, name: str, content: bytes) -> None:
        license = _license_of_content(content)
        folder = posixpath.dirname(name)
        # a wheel's licence lies next to its code
        if license and ".dist-info" in folder:
            folder = ""
        self._by_folder[folder] = self._by_folder.get(folder) or license


def _license_in(folder: Place) -> str | None:
    try:
        names = sorted(path for path in folder.iterdir() if is_license_file(path.name) and path.is_file())
        return next((license for path in names if (license := _license_of_content(path.read_bytes()[:_LARGEST]))), None)
    except OSError:
        return None


def _license_of_content(content: bytes) -> str | None:
    return stated_license(content[:2000]) or license_of_text(content.decode("utf-8", errors="replace"))


ZIP_SUFFIXES = (".zip", ".whl")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = ZIP_SUFFIXES + TAR_SUFFIXES

#: What all members of one archive together may expand to: this, or this many times its size (files that overlap in a
#: zip make a bomb of harmless members).
_FREE_BYTES = 1 << 30
_MOST_EXPANSION = 250
_TAR_BLOCK = 1 << 18


@dataclass
class Surroundings:
    """State that the files of a unit share."""

    #: The licence that the source's settings state for everything in it.
    license: str | None = None
    #: The name of the archive that holds them; `` outside one.
    archive: str = ""
    #: The licences that LICENSE files around them state.
    licenses: LicenseFiles = field(default_factory=LicenseFiles)
    #: Folders around them that were looked at → whether each is a git checkout.
    checkouts: dict[Place, bool] = field(default_factory=dict)
    #: Processes with limits, for parsers that may hang or crash.
    helpers: Helpers = field(default_factory=Helpers)


class Entry:
    """One file to read documents from: on disk, or inside an archive."""

    def __init__(
        self, name: str, size_bytes: int, opened: Callable[[int, int], Stream], around: Surroundings, path: Place | None = None
    ) -> None:
        #: Full name below the source's root, an archive's name first: what notes say.
        self.place = name
        #: `place` without the suffix of a compression. Documents are named after it.
        self.name = uncompressed_name(name)
        self.size_bytes = size_bytes
        #: Where it lies, None inside an archive.
        self.path = path
        self.around = around
        self._opened = opened
        self._last: Stream | None = None

    @property
    def license(self) -> str | None:
        """The licence that the source's settings state."""
        return self.around.license

    def open(self, start: int = 0, *, member: int = 0) -> Stream:
        """Its bytes, decompressed, behind the first `start`; `member`: see `open_stream`, for files in no archive."""
        self._last = self._opened(start, member)
        return self._last

    def open_text(self, start: int = 0, tally: Tally | None = None) -> Stream:
        """Its text as UTF-8, behind the first `start` bytes of that, whatever encoding it is in. One that is not UTF-8 is noted
        in the tally, when reading begins."""
        opened = self.open()
        stream, encoding = text_of(opened)
        if encoding == UTF8 and start and self.path is not None:
            # `_opened` reaches the place by a seek
            opened.close()
            return self.open(start)
        stream.skip(start)
        if encoding != UTF8 and start == 0 and tally is not None:
            tally.set_aside(OTHER_ENCODING, self.place, f"read as {encoding}")
        return stream

    def content(self, limit: int, tally: Tally) -> bytes | None:
        """All its bytes; None, set aside in the tally, when they are more than `limit`, damaged, or none."""
        with self.open() as stream:
            data = stream.read(limit + 1)
            damage = stream.damage
        if damage is not None:
            tally.set_aside(damage.kind, self.place, damage.why)
        elif len(data) > limit:
            tally.set_aside("too_large", self.place, f"over {limit:,} bytes")
        elif not data:
            tally.set_aside("empty_files", self.place, "it is empty")
        else:
            return data
        return None

    @property
    def is_compressed(self) -> bool:
        """Whether its name carries the suffix of a compression."""
        return self.place != self.name

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link on disk: in somebody else's checkout it may lead anywhere on this machine."""
        return self.path is not None and self.path.is_symlink()

    def license_nearby(self) -> str | None:
        """The licence that the nearest LICENSE file in the folders above it states, else the settings'."""
        inside = self.name.removeprefix(f"{self.around.archive}/")
        return self.around.licenses.license_of(inside, self.path) or self.license

    def bytes_read(self) -> int:
        """Bytes read from the stream that was opened last."""
        return self._last.given if self._last is not None else 0


def is_archive(name: str, suffixes: tuple[str, ...] = ARCHIVES) -> bool:
    """Whether a file is read member by member, by its name."""
    return name.lower().endswith(suffixes)


def plain_entry(name: str, path: Place, around: Surroundings) -> Entry:
    """A file as an entry. Raises OSError when it is gone."""
    return Entry(name, path.stat().st_size, lambda start, member: open_stream(path, start, member=member), around, path)


def entries(
    unit: Unit, first: int, reads: Callable[[str], bool], archives: tuple[str, ...], around: Surroundings, tally: Tally
) -> Iterator[tuple[int, Entry]]:
    """The files of a unit from number `first` on, with their numbers. `reads` says which members of an archive are meant. An
    entry must be read before the next is asked for."""
    if len(unit.files) == 1 and is_archive(unit.files[0][0], archives):
        ((name, path),) = unit.files
        is_zip = name.lower().endswith(ZIP_SUFFIXES)
        around.archive = name if is_zip else uncompressed_name(name)
        around.licenses = LicenseFiles((name, path))
        members = (_zip_entries if is_zip else _tar_entries)(name, path, first, reads, around, tally)
        try:
            yield from _Budget(path.stat().st_size).spent(members, name, tally)
        except BessemerError:
            raise
        except Exception as error:  # zipfile and tarfile let through whatever hostile bytes make them stumble over
            tally.set_aside("damaged_files", name, f"not a whole archive ({error or type(error).__name__})")
        return
    for number, (name, path) in enumerate(unit.files[first:], start=first):
        try:
            entry = plain_entry(name, path, around)
        except OSError as error:
            tally.set_aside("unreadable_files", name, error.strerror or str(error))
        else:
            yield number, entry


@dataclass
class _Budget:
    """Limit on the expansion of an archive."""

    archive_bytes: int
    used: int = 0

    def spent(self, members: Iterator[tuple[int, Entry]], name: str, tally: Tally) -> Iterator[tuple[int, Entry]]:
        for number, entry in members:
            yield number, entry
            self.used += entry.bytes_read()
            if self.used > _FREE_BYTES + _MOST_EXPANSION * self.archive_bytes:
                tally.set_aside("decompression_bombs", name, f"its members expand more than {_MOST_EXPANSION} times")
                return


def _zip_entries(
    name: str, path: Place, first: int, reads: Callable[[str], bool], around: Surroundings, tally: Tally
) -> Iterator[tuple[int, Entry]]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for number, member in enumerate(archive.infolist()):
            if number < first or member.is_dir() or not reads(uncompressed_name(member.filename)):
                continue
            full = f"{name}/{member.filename}"
            if member.flag_bits & 1:
                tally.set_aside("encrypted_files", full, "it is encrypted")
            elif (member.external_attr >> 16) & 0o170000 == 0o120000:
                tally.set_aside("unsafe_members", full, "it is a link")
            elif _is_safe(member.filename, full, tally):
                yield number, Entry(encodable(full), member.compress_size, _zip_member(archive, member), around)


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[int, int], Stream]:
    def opened(start: int, _: int) -> Stream:
        try:
            source = archive.open(member)
        except BessemerError:
            raise
        except Exception as error:  # its header is not what the directory says, or its method is unknown
            return broken_stream(f"cannot be read ({error})")
        return stream_of(source, member.filename, start, size=member.file_size, compressed_bytes=member.compress_size)

    return opened


class _Header(tarfile.TarInfo):
    """A tar's header that says when it is damaged. The library takes a bad header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise ValueError(f"damaged or cut off: {error}") from None


def _tar_entries(
    name: str, path: Place, first: int, reads: Callable[[str], bool], around: Surroundings, tally: Tally
) -> Iterator[tuple[int, Entry]]:
    with path.open("rb") as file, open_stream(path) as stream, _opened_tar(name, file, stream) as archive:
        try:
            for number, member in enumerate(archive):
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
                if number < first or member.isdir() or not reads(uncompressed_name(member.name)):
                    continue
                full = encodable(f"{around.archive}/{member.name}")
                if not member.isreg() or member.issparse():
                    tally.set_aside("unsafe_members", full, "it is a link, a device or a sparse file")
                elif _is_safe(member.name, full, tally):
                    yield number, Entry(full, member.size, _tar_member(archive, member), around)
        except (tarfile.TarError, ValueError, EOFError) as error:
            damage = stream.damage
            tally.set_aside(
                "damaged_files" if damage is None else damage.kind, name, str(error if damage is None else damage.why)
            )
            return
        if stream.damage is not None:
            tally.set_aside(stream.damage.kind, name, stream.damage.why)


def _opened_tar(name: str, file: IO[bytes] | io.RawIOBase, stream: Stream) -> tarfile.TarFile:
    # skips unwanted members by a seek
    if name.lower().endswith(".tar"):
        return tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:", tarinfo=_Header)
    return tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", bufsize=_TAR_BLOCK, tarinfo=_Header)


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[int, int], Stream]:
    def opened(start: int, _: int) -> Stream:
        source = archive.extractfile(member)
        assert source is not None, "only regular files are opened"
        return stream_of(source, member.name, start, size=member.size)

    return opened


def _is_safe(name: str, full: str, tally: Tally) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or parts[0].endswith(":"):
        tally.set_aside("unsafe_members", full, "its name leads out of the archive")
        return False
    return True
