"""From a source's settings to the source itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.core.usercode import load_user_function, user_function_hash
from bessemer.data.config import FilesSource, PythonDocsSource, UserSource, WheelsSource
from bessemer.data.config import Source as SourceConfig
from bessemer.data.sources.document import Tally
from bessemer.data.sources.files import files_source
from bessemer.data.sources.lock import DownloadError, Pin, cached_wheel, fetch_wheels, lock_path, read_lock
from bessemer.data.sources.python_docs import python_docs_fingerprint, read_python_docs
from bessemer.data.sources.records import record_document
from bessemer.data.sources.source import Found, Source, Unit
from bessemer.data.sources.wheels import read_wheel


def open_source(config: SourceConfig, cache: Path, folder: Path, progress: Progress) -> Source:
    """The source that settings describe; what it needs from a network is fetched into `cache`.

    Raises DownloadError when that cannot be had, SourceError or ConfigError when what the settings name does not exist.
    """
    if isinstance(config, WheelsSource):
        return _Wheels(fetch_wheels(read_lock(lock_path(config.lock, folder)), cache, progress))
    if isinstance(config, PythonDocsSource):
        return _PythonDocs()
    if isinstance(config, FilesSource):
        return files_source(config.paths, folder, config.max_document_bytes)
    assert isinstance(config, UserSource)
    load_user_function(config.source, folder)  # a mistake is found before anything is read
    return _UserFunction(config.source, folder, config.options)


def source_fingerprint(
    source: SourceConfig, *, cache: Path, folder: Path = Path(), fetch: bool = True, progress: Progress | None = None
) -> Any:
    """What a source's documents depend on beyond its settings, as a JSON value for the stage's key.

    An optional source of wheels is fetched here, since whether it can be decides what is collected; with `fetch`
    false only the cache is looked at.
    Raises SourceError or ConfigError when what the source names does not exist.
    """
    if isinstance(source, WheelsSource):
        path = lock_path(source.lock, folder)
        if source.optional and not _available(read_lock(path), cache, fetch, progress):
            return {"lock": None}
        return {"lock": hash_file(path)}
    if isinstance(source, PythonDocsSource):
        return python_docs_fingerprint()
    if isinstance(source, FilesSource):
        return files_source(source.paths, folder, source.max_document_bytes).fingerprint()
    return user_function_hash(source.source, folder)


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False


@dataclass(frozen=True)
class _Wheels:
    wheels: list[Path]

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit(wheel.name, wheel.stat().st_size, ((wheel.name, wheel),)) for wheel in self.wheels]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[Found]:
        tally.bytes += unit.size_bytes
        for number, document in enumerate(read_wheel(unit.files[0][1], tally), start=1):
            if number > start and document.text.strip():
                yield number, document

    def fingerprint(self) -> Any:
        return None


@dataclass(frozen=True)
class _PythonDocs:
    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit("python_docs", 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[Found]:
        for number, document in enumerate(read_python_docs(tally), start=1):
            if number > start and document.text.strip():
                yield number, document

    def fingerprint(self) -> Any:
        return python_docs_fingerprint()


@dataclass(frozen=True)
class _UserFunction:
    """A user's own function, called where its documents are read: one unit, skipped through when reading goes on."""

    name: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit(self.name, 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[Found]:
        function = load_user_function(self.name, self.folder)
        try:
            for number, record in enumerate(function(**self.options), start=1):
                if number > start:
                    document = record_document(record, self.name)
                    if document.text.strip():
                        yield number, document
        except BessemerError:
            raise
        except Exception as error:  # anything a user's function may raise
            raise SourceError(f"{self.name}: it failed: {type(error).__name__}: {error}") from error

    def fingerprint(self) -> Any:
        return user_function_hash(self.name, self.folder)
