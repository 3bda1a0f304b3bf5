"""Files that a source's settings mean: their kind by name, their units, and fingerprints of their content.

A name gives a file's compression, and which source reads what is in it. Needs no package of the extra `data`.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from bessemer.core.concurrency import thread_pool
from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.core.hashing import hash_bytes, hash_file
from bessemer.core.object_storage import ObjectPath, Place, fingerprint_of, has_pattern, is_address
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import read_json, write_text
from bessemer.data.sources.source import Unit, encodable

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
#: One suffix for a tar and its compression.
_JOINED = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}

#: Suffix → the source that reads such files whatever is in them.
READ_BY = {
    **dict.fromkeys((".txt", ".md", ".jsonl"), "files"),
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".pq", ".ndjson"), "tables"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".mbox", ".mbx"), "mbox"),
    **dict.fromkeys((".py", ".ipynb", ".c", ".cpp", ".h", ".java", ".js", ".ts", ".go", ".rs"), "code"),
    ".epub": "epub",
    ".pdf": "pdf",
    ".tex": "latex",
    ".xml": "mediawiki",
    ".rst": "docs",
}
#: Suffix → a command or a way that converts such files into a kind that a source reads.
CONVERTED_BY = {
    **dict.fromkeys((".docx", ".odt", ".rtf"), "pandoc FILE -t plain --wrap none -o FILE.txt"),
    **dict.fromkeys((".doc", ".ppt", ".pptx"), "soffice --convert-to pdf FILE, for {source: pdf}"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV, for {source: tables}"),
    ".json": "jq -c '.[]' FILE > FILE.jsonl, where it is a list of objects",
    ".7z": "unpack it",
}


def compression_of(name: str) -> str:
    """The compression that a file's name states, `` for none."""
    lowered = name.lower()
    return next((suffix for suffix in COMPRESSIONS if lowered.endswith(suffix)), _JOINED.get(lowered[lowered.rfind(".") :], ""))


def uncompressed_name(name: str) -> str:
    """A name without its compression: `a.txt.gz` is `a.txt`, `a.tgz` is `a.tar`."""
    stem, dot, suffix = name.rpartition(".")
    if dot + suffix.lower() in COMPRESSIONS:
        return stem
    return f"{stem}.tar" if dot + suffix.lower() in _JOINED else name


def suffix_of(name: str) -> str:
    """The suffix of a file without that of a compression, in small letters."""
    return PurePosixPath(uncompressed_name(name)).suffix.lower()


def advice(name: str) -> str:
    """End of a message: the source or the conversion for a file of another kind; empty where none is known."""
    suffix = suffix_of(name)
    if suffix in READ_BY:
        return f"; {{source: {READ_BY[suffix]}}} reads {suffix}"
    return f"; to convert {suffix}: {CONVERTED_BY[suffix]}" if suffix in CONVERTED_BY else ""


def counted_kinds(names: Iterable[str]) -> str:
    """Numbers of files by kind, of kinds that could be read: `12 .pdf, 3 .docx; {source: pdf} reads .pdf; …`."""
    kinds = Counter(suffix for name in names if (suffix := suffix_of(name)) in READ_BY or suffix in CONVERTED_BY)
    shown = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    return ", ".join(f"{count:,} {suffix}" for suffix, count in shown) + "".join(advice(f"a{suffix}") for suffix, _ in shown)


_PathType = TypeVar("_PathType", bound=PurePath)

#: Most small files, and most bytes of them, that are read as one unit, so that a tree of a million pages is not as many units.
_BUNDLE_FILES = 256
_BUNDLE_BYTES = 32 << 20

#: From this size on a file's fingerprint is remembered: smaller ones are read as fast as it is looked up.
_REMEMBERED_BYTES = 1 << 20
_SETTLED_NANOSECONDS = 3_000_000_000
_LONG_READ_BYTES = 256 << 20
_FILES_AT_ONCE = 4


def find_files(paths: list[str], folder: Path, reads: Callable[[str], bool], known: str) -> dict[str, Place]:
    """The files that paths, folders and patterns mean, by their name below the source's root, sorted by it.

    The root is the deepest folder that holds everything named, whatever a pattern or a folder turns out to hold: a tree has
    the same names on a disk and on object storage. `reads` says by its name whether a file is of a kind that the source
    reads, `known` names those kinds.
    Raises SourceError for a path that does not exist, a file of an unknown kind, or a pattern without matches.
    """
    if any(map(is_address, paths)):
        return _find_objects(paths, reads, known)
    roots: list[Path] = []
    files: set[Path] = set()
    for path in paths:
        full = Path(os.path.normpath(folder.resolve() / path))
        if full.is_dir():
            matches = {file for file in full.rglob("*") if reads(file.relative_to(full).as_posix()) and file.is_file()}
            roots.append(full)
        elif full.is_file():
            if not reads(full.name):
                raise SourceError(f"{path}: not a kind of file that the source reads ({known}){advice(path)}")
            matches = {full}
            roots.append(full.parent)
        else:
            fixed = _fixed_part(full)
            if fixed == full:
                raise SourceError(f"{path}: no such file or folder")
            pattern = full.relative_to(fixed).as_posix()
            matches = {file for file in fixed.glob(pattern) if reads(file.relative_to(fixed).as_posix()) and file.is_file()}
            roots.append(fixed)
        if not matches:
            there = counted_kinds(file.name for file in full.rglob("*") if file.is_file()) if full.is_dir() else ""
            raise SourceError(
                f"{path}: holds no file that the source reads ({known}){f', but {there}' if there else advice(path)}"
            )
        files |= matches
    root = Path(os.path.commonpath(roots))
    return dict(sorted((encodable(file.relative_to(root).as_posix()), file) for file in files))


def other_files(paths: list[str], folder: Path, reads: Callable[[str], bool]) -> list[str]:
    """The files that hold text, in the folders among `paths`, and that a source does not read. Sorted, without hidden ones."""
    others: set[str] = set()
    for path in paths:
        full = Path(os.path.normpath(folder.resolve() / path))
        for file in full.rglob("*") if not is_address(path) and full.is_dir() else ():
            name = file.relative_to(full)
            holds_text = advice(name.name) and not reads(name.as_posix())
            if holds_text and file.is_file() and not any(part.startswith(".") for part in name.parts):
                others.add(encodable((PurePosixPath(path) / name.as_posix()).as_posix()))
    return sorted(others)


def _find_objects(paths: list[str], reads: Callable[[str], bool], known: str) -> dict[str, Place]:
    """`find_files` on object storage. Of an object the listing tells size and version, so that none is opened for them."""
    if len({path.partition("://")[0] if is_address(path) else "" for path in paths}) > 1:
        raise SourceError(f"{', '.join(paths)}: the paths of one source lie in one storage; make two sources of them")
    roots, files = [], set()
    for path in paths:
        try:
            named = ObjectPath.parse(path)
        except ConfigError as error:
            raise SourceError(str(error)) from None
        objects = named.find()
        if not objects and not has_pattern(path):
            raise SourceError(f"{path}: no such object or folder")
        is_one = objects == [named]
        root = named.parent.key if is_one else _fixed_part(PurePosixPath(named.key)).as_posix()
        matches = {file for file in objects if reads(file.key.removeprefix(f"{root}/"))}
        if is_one and not matches:
            raise SourceError(f"{path}: not a kind of file that the source reads ({known}){advice(path)}")
        if not matches:
            raise SourceError(f"{path}: holds no file that the source reads ({known}){advice(path)}")
        roots.append(root)
        files |= matches
    common = posixpath.commonpath(roots)
    return dict(sorted((encodable(file.key[len(common) :].lstrip("/")), file) for file in files))


def units_of(files: Mapping[str, Place], *, bundled: Callable[[str], bool]) -> list[Unit]:
    """Files as units, in the order of their names: each its own, those that are `bundled` together with their neighbours."""
    return list(_units(files, bundled))


def _units(files: Mapping[str, Place], bundled: Callable[[str], bool]) -> Iterator[Unit]:
    held: list[tuple[str, Place]] = []
    held_bytes = 0
    for name, path in files.items():
        size = path.stat().st_size
        if not bundled(name):
            yield Unit(name, size, ((name, path),))
            continue
        if held and (len(held) == _BUNDLE_FILES or held_bytes + size > _BUNDLE_BYTES):
            yield _bundle(held, held_bytes)
            held, held_bytes = [], 0
        held.append((name, path))
        held_bytes += size
    if held:
        yield _bundle(held, held_bytes)


def _bundle(files: list[tuple[str, Place]], size: int) -> Unit:
    name = files[0][0] if len(files) == 1 else f"{files[0][0]} … {files[-1][0]}"
    return Unit(name, size, tuple(files))


def content_fingerprint(path: Place) -> Any:
    """Hash of a file's whole content. Of an object, what the listing tells: its size and version."""
    return hash_file(path) if isinstance(path, Path) else fingerprint_of(path)


class ContentFingerprints:
    """`content_fingerprint` of many files, side by side. Those that take long to read are remembered in `cache` and read again
    when they have changed.

    A file counts as unchanged while its path, size, inode, and the times of its last write and of its last change of status,
    in nanoseconds, stay the same. One that changed within the last seconds is not remembered: another write may bear the same
    time. `now` gives the time in nanoseconds.
    """

    def __init__(
        self, cache: Path | None = None, progress: Progress | None = None, now: Callable[[], int] = time.time_ns
    ) -> None:
        self._folder = None if cache is None else cache / "fingerprints"
        self._progress = progress or Silent()
        self._now = now

    def of(self, files: Iterable[Place]) -> list[Any]:
        """The fingerprints of files, in their order."""
        fingerprints: dict[Place, Any] = {}
        unread: list[tuple[Path, os.stat_result]] = []
        for file in files:
            if not isinstance(file, Path):
                fingerprints[file] = fingerprint_of(file)
            elif (known := self._remembered(file, status := file.stat())) is not None:
                fingerprints[file] = known
            else:
                # a placeholder keeps the order
                fingerprints[file] = None
                unread.append((file, status))
        total = sum(status.st_size for _, status in unread)
        # a progress bar only where reading takes a second or more
        progress = self._progress if total >= _LONG_READ_BYTES else Silent()
        with (
            progress.task("reading what the sources name", total=total, unit="bytes") as task,
            thread_pool(_FILES_AT_ONCE) as pool,
        ):
            hashes = pool.map(partial(self._read, on_read=task.advance), *zip(*unread, strict=True)) if unread else ()
            fingerprints |= {file: value for (file, _), value in zip(unread, hashes, strict=True)}
        return list(fingerprints.values())

    def _read(self, file: Path, before: os.stat_result, on_read: Callable[[int], None]) -> str:
        started = self._now()
        value = hash_file(file, on_read=on_read)
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < started - _SETTLED_NANOSECONDS
        if self._folder is not None and before.st_size >= _REMEMBERED_BYTES and settled:
            state = _state(file, file.stat())
            if state == _state(file, before):
                # without a writable cache, files are hashed again: slower, nothing else
                with contextlib.suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_text(self._entry(file), json.dumps({"state": state, "hash": value}), synchronise=False)
        return value

    def _remembered(self, file: Path, status: os.stat_result) -> str | None:
        if self._folder is None or status.st_size < _REMEMBERED_BYTES:
            return None
        try:
            entry = read_json(self._entry(file))
        except (ArtefactError, OSError):
            return None
        known = entry.get("hash") if isinstance(entry, dict) and entry.get("state") == _state(file, status) else None
        return known if isinstance(known, str) else None

    def _entry(self, file: Path) -> Path:
        assert self._folder is not None
        return self._folder / f"{hash_bytes(os.fsencode(file.absolute()))}.json"


def _state(file: Path, status: os.stat_result) -> list[Any]:
    """The state of a file that changes with its content."""
    path = os.fsencode(file.absolute()).hex()
    return [path, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _fixed_part(pattern: _PathType) -> _PathType:
    """The leading folders of a path that hold no wildcard."""
    parts = []
    for part in pattern.parts:
        if has_pattern(part):
            break
        parts.append(part)
    return type(pattern)(*parts)
