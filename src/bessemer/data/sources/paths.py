"""Which files a source's settings mean, how they are grouped into units, and what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_file
from bessemer.data.sources.document import encodable
from bessemer.data.sources.source import Unit

#: Small files are read together up to so many, and so many bytes, so that a tree of a million pages is not as many units.
_BUNDLE_FILES = 256
_BUNDLE_BYTES = 32 << 20

#: A larger file is not hashed whole, which would read terabytes before the first document, but in samples.
_WHOLE_HASH_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def find_files(paths: list[str], folder: Path, reads: Callable[[str], bool], known: str) -> dict[str, Path]:
    """The files that paths, folders and patterns mean, by their name below the source's root, sorted by it.

    The root is the deepest folder that holds everything named, whatever a pattern or a folder turns out to hold.
    `reads` says by its name whether a file is of a kind that the source reads, `known` names those kinds.
    Raises SourceError for a path that does not exist, a file of an unknown kind, or a pattern without matches.
    """
    roots, found = [], set()
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


def units_of(files: dict[str, Path], *, bundled: Callable[[str], bool]) -> list[Unit]:
    """Files as units, in the order of their names: each its own, those that are `bundled` together with their neighbours."""
    return list(_units(files, bundled))


def _units(files: dict[str, Path], bundled: Callable[[str], bool]) -> Iterator[Unit]:
    held: list[tuple[str, Path]] = []
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


def _bundle(files: list[tuple[str, Path]], size: int) -> Unit:
    name = files[0][0] if len(files) == 1 else f"{files[0][0]} … {files[-1][0]}"
    return Unit(name, size, tuple(files))


def content_hash(path: Path) -> str:
    """Hash of a file's content; of a file over 256 MB, of its size and 64 samples spread evenly over it."""
    size = path.stat().st_size
    if size <= _WHOLE_HASH_BYTES:
        return hash_file(path)
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a path that hold no wildcard."""
    parts = []
    for part in pattern.parts:
        if any(wildcard in part for wildcard in "*?["):
            break
        parts.append(part)
    return Path(*parts)
