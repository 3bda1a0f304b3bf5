"""Licences of a tree's files: that of the nearest LICENSE file in the folders above."""

from __future__ import annotations

import posixpath
import re
import tarfile
import zipfile
from dataclasses import dataclass, field

from bessemer.core.errors import BessemerError
from bessemer.core.object_storage import Place
from bessemer.data.sources.io.streams import open_stream
from bessemer.data.sources.licenses import license_of_text, stated_license

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
        found = _license_of_content(content)
        folder = posixpath.dirname(name)
        # a wheel keeps its licence beside the code
        if found and ".dist-info" in folder:
            folder = ""
        self._by_folder[folder] = self._by_folder.get(folder) or found


def _license_in(folder: Place) -> str | None:
    try:
        names = sorted(path for path in folder.iterdir() if is_license_file(path.name) and path.is_file())
        return next((found for path in names if (found := _license_of_content(path.read_bytes()[:_LARGEST]))), None)
    except OSError:
        return None


def _license_of_content(content: bytes) -> str | None:
    return stated_license(content[:2000]) or license_of_text(content.decode("utf-8", errors="replace"))
