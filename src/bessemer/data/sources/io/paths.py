"""Files that a source's settings mean, how they are grouped into units, and fingerprints of their content."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.object_storage import ObjectPath, Place, fingerprint_of, has_pattern, is_address
from bessemer.data.sources.document import encodable
from bessemer.data.sources.source import Unit

_PathType = TypeVar("_PathType", bound=PurePath)

#: Most small files, and most bytes of them, that are read as one unit, so that a tree of a million pages is not as many units.
_BUNDLE_FILES = 256
_BUNDLE_BYTES = 32 << 20

#: A larger file is not hashed whole, which would read terabytes before the first document, but in samples.
_WHOLE_HASH_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


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
    found: set[Path] = set()
    for path in paths:
        full = Path(os.path.normpath(folder.resolve() / path))
        if full.is_dir():
            matches = {file for file in full.rglob("*") if reads(file.relative_to(full).as_posix()) and file.is_file()}
            roots.append(full)
        elif full.is_file():
            if not reads(full.name):
                raise SourceError(f"{path}: not a kind of file that the source reads ({known})")
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
            raise SourceError(f"{path}: holds no file that the source reads ({known})")
        found |= matches
    root = Path(os.path.commonpath(roots))
    return dict(sorted((encodable(file.relative_to(root).as_posix()), file) for file in found))


def _find_objects(paths: list[str], reads: Callable[[str], bool], known: str) -> dict[str, Place]:
    """`find_files` on object storage. Of an object the listing tells size and version, so that none is opened for them."""
    if len({path.partition("://")[0] if is_address(path) else "" for path in paths}) > 1:
        raise SourceError(f"{', '.join(paths)}: the paths of one source lie in one storage; make two sources of them")
    roots, found = [], set()
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
            raise SourceError(f"{path}: not a kind of file that the source reads ({known})")
        if not matches:
            raise SourceError(f"{path}: holds no file that the source reads ({known})")
        roots.append(root)
        found |= matches
    common = posixpath.commonpath(roots)
    return dict(sorted((encodable(file.key[len(common) :].lstrip("/")), file) for file in found))


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
    """Hash of a file's content; of a file over 256 MB, of its size and 64 samples spread evenly over it. Of an object, what
    the listing tells: its size and version."""
    if not isinstance(path, Path):
        return fingerprint_of(path)
    size = path.stat().st_size
    if size <= _WHOLE_HASH_BYTES:
        return hash_file(path)
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _fixed_part(pattern: _PathType) -> _PathType:
    """The leading folders of a path that hold no wildcard."""
    parts = []
    for part in pattern.parts:
        if has_pattern(part):
            break
        parts.append(part)
    return type(pattern)(*parts)
