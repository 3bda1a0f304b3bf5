"""Source `wheels`: documentation inside pinned packages, read from the wheel's zip, never installed, never imported."""

from __future__ import annotations

import email.message
import email.parser
import email.policy
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.data.sources.config import WheelsSource
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.origins.docstrings import docstrings, is_documentation_code
from bessemer.data.sources.origins.lock import DownloadError, Pin, cached_wheel, fetch_wheels, lock_path, read_lock
from bessemer.data.sources.source import PositionedDocument, Unit, counted

_PAGE_SUFFIXES = (".md", ".rst")
_NOT_PROSE = re.compile(r"licen[cs]e|copying|notice|authors|contributors|changelog|changes|history|security|codeowners", re.I)
#: A line that is only badges, images with their options, or HTML tags: the decoration of a README.
_DECORATION = re.compile(
    r"\s*(?:(?:\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?\s*)+"
    r"|\.\. (?:image|figure|\|[^|]*\| image)::.*"
    r"|:(?:target|alt|align|width|height): .*"
    r"|(?:</?[a-z][^>]*>\s*)+)"
)
_LONGEST_LICENSE_NAME = 60


@dataclass(frozen=True)
class Wheels:
    """The wheels of a lock file, each a unit."""

    lock: Path
    cache: Path

    def units(self, progress: Progress | None = None) -> list[Unit]:
        """The wheels; raises DownloadError, too, when one that is not in the cache cannot be fetched."""
        wheels = fetch_wheels(read_lock(self.lock), self.cache, progress)
        return [Unit(wheel.name, wheel.stat().st_size, ((wheel.name, wheel),)) for wheel in wheels]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        ((_, wheel),) = unit.files
        assert isinstance(wheel, Path), "wheels lie in the cache"
        if start == 0:
            tally.bytes += unit.size_bytes
        yield from counted(lambda met: read_wheel(wheel, met), start, tally)

    def fingerprint(self) -> Any:
        return {"lock": hash_file(self.lock)}


def open_wheels(settings: WheelsSource, folder: Path, cache: Path) -> Wheels:
    """The source `wheels` of a lock, whose downloads lie in `cache`."""
    return Wheels(lock_path(settings.lock, folder), cache)


def wheels_fingerprint(
    settings: WheelsSource, folder: Path, cache: Path, fetch: bool, progress: Progress | None = None
) -> dict[str, str | None]:
    """The hash of the lock; None for an optional source that cannot be fetched.

    Whether it can be decides what is collected, so that it is fetched here; with `fetch` false only the cache is looked at.
    """
    path = lock_path(settings.lock, folder)
    if settings.optional and not _available(read_lock(path), cache, fetch, progress):
        return {"lock": None}
    return {"lock": hash_file(path)}


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False


def read_wheel(wheel: Path, tally: Tally) -> Iterator[Document]:
    """The documents of one wheel: docstrings, README pages, and the description in its metadata.

    Raises SourceError when the file is not a wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            metadata = _metadata(archive, names, wheel)
            package = str(metadata["Name"])
            common = {"package": package, "version": str(metadata["Version"])}
            fields: dict[str, Any] = {"url": _homepage(metadata), "license": license_of(metadata), "group": package}
            for name in filter(is_documentation_code, names):
                tally.files += 1
                try:
                    for found in docstrings(archive.read(name), name):
                        yield found.document(f"{package}/{name}", common, **fields)
                except (SyntaxError, ValueError) as error:
                    tally.counts["unparseable_files"] += 1
                    tally.notes.append(f"{wheel.name}: {name}: {error}")
            for name, page in _pages(archive, names, metadata):
                described = {"kind": "page", "module": "", "qualname": PurePosixPath(name).name}
                yield Document(f"{package}/{name}", readable_page(page), metadata=common | described, **fields)
    except (zipfile.BadZipFile, NotImplementedError, zlib.error) as error:
        raise SourceError(f"{wheel}: this is not a readable wheel ({error})") from None


def _pages(archive: zipfile.ZipFile, names: list[str], metadata: email.message.Message) -> Iterator[tuple[str, str]]:
    description = metadata.get_payload()
    if isinstance(description, str):
        yield f"{metadata['Name']}.md", description
    for name in names:
        if name.endswith(_PAGE_SUFFIXES) and is_prose_page(name):
            yield name, archive.read(name).decode("utf-8", errors="replace")


def is_prose_page(name: str) -> bool:
    """Whether a page of a package is documentation, by its name: no licence, list of changes or of authors."""
    return ".dist-info/" not in name and not _NOT_PROSE.search(name)


def _metadata(archive: zipfile.ZipFile, names: list[str], wheel: Path) -> email.message.Message:
    for name in names:
        if name.endswith(".dist-info/METADATA") and name.count("/") == 1:
            text = archive.read(name).decode("utf-8", errors="replace")
            found = email.parser.Parser(policy=email.policy.compat32).parsestr(text)
            if found["Name"] and found["Version"]:
                return found
    raise SourceError(f"{wheel}: this is not a wheel: it has no METADATA with a name and a version")


def license_of(metadata: email.message.Message) -> str | None:
    """A package's licence as its metadata names it: the SPDX expression, else a short `License`, else the classifier."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    stated = str(metadata.get("License") or "").strip()
    if stated and "\n" not in stated and len(stated) <= _LONGEST_LICENSE_NAME:
        return stated
    classifiers = [str(value) for value in metadata.get_all("Classifier", []) if str(value).startswith("License ::")]
    return classifiers[0].split(" :: ")[-1] if classifiers else None


def _homepage(metadata: email.message.Message) -> str | None:
    if home := metadata.get("Home-page"):
        return str(home)
    links = dict(str(value).split(", ", 1) for value in metadata.get_all("Project-URL", []) if ", " in str(value))
    for label in ("Homepage", "homepage", "Documentation", "Source", "Repository"):
        if label in links:
            return links[label]
    return next(iter(links.values()), None)


def readable_page(text: str) -> str:
    """A README or page without badges, images and raw HTML tags on lines of their own, and without blank runs."""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line in lines if not line or not _DECORATION.fullmatch(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
