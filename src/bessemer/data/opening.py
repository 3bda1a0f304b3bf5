"""From a source's settings to the source itself: those of packages, of plain files and of a user's function; see `sources`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.core.usercode import load_user_function
from bessemer.data.config import FilesSource, PythonDocsSource, UserSource, WheelsSource
from bessemer.data.config import Source as Settings
from bessemer.data.sources import opening
from bessemer.data.sources.files import files_source
from bessemer.data.sources.lock import DownloadError, Pin, cached_wheel, fetch_wheels, lock_path, read_lock
from bessemer.data.sources.python_docs import PythonDocs
from bessemer.data.sources.source import Source
from bessemer.data.sources.user import UserFunction
from bessemer.data.sources.wheels import Wheels


def open_source(settings: Settings, cache: Path, folder: Path) -> Source:
    """The source that settings describe; paths are relative to `folder`, what is fetched lies in `cache`.

    Raises SourceError or ConfigError when what the settings name does not exist.
    """
    if isinstance(settings, WheelsSource):
        return Wheels(lock_path(settings.lock, folder), cache)
    if isinstance(settings, PythonDocsSource):
        return PythonDocs()
    if isinstance(settings, FilesSource):
        return files_source(settings.paths, folder, settings.max_document_bytes, settings.license)
    if isinstance(settings, UserSource):
        load_user_function(settings.source, folder)  # a mistake is found before anything is read
        return UserFunction(settings.source, folder, settings.options)
    return opening.open_source(settings, folder, cache)


def source_fingerprint(
    settings: Settings, *, cache: Path, folder: Path = Path(), fetch: bool = True, progress: Progress | None = None
) -> Any:
    """What a source's documents depend on beyond its settings, as a JSON value for the stage's key.

    An optional source of wheels is fetched here, since whether it can be decides what is collected; with `fetch`
    false only the cache is looked at.
    Raises SourceError or ConfigError when what the source names does not exist.
    """
    if isinstance(settings, WheelsSource):
        path = lock_path(settings.lock, folder)
        if settings.optional and not _available(read_lock(path), cache, fetch, progress):
            return {"lock": None}
        return {"lock": hash_file(path)}
    return open_source(settings, cache, folder.absolute()).fingerprint()


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False
