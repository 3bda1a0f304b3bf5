"""An index on object storage: its versions as folders of objects, and a pointer object that names the current one.

An index is built and read in a copy on this machine, since its words are mapped into memory, a version is swapped by a rename,
and writers lock a folder, none of which object storage has. `fetched` brings the copy up to date, `published` uploads its new
version under a name of its own, compares what is there with what was built, and only then writes the pointer, `index.json`,
which storage replaces at once. So a reader finds a whole version at any moment, also after a writer was killed. A writer whose
version is not of the one that the pointer names is refused. Two that write the pointer in the same second are not told apart:
the later one wins, and either version is whole.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.core.object_storage import ObjectPath, is_address
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import locked_folder, read_json, write_json
from bessemer.retrieval.index import ACCESS, INDEX, PATIENCE, VERSIONS

#: In the pointer, and in the file beside a copy that says what it was made of: the folder of the version's objects.
_PLACE = "place"
#: What travels with an index beside its versions; where documents lie on one machine does not.
_BESIDE = (ACCESS,)


def cache_folder() -> Path:
    """Where copies of indexes lie."""
    from torch._appdirs import user_cache_dir

    return Path(user_cache_dir(appname="bessemer")) / "indexes"


def local_index(place: str, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of an index: `place` itself, or of an address on object storage an up-to-date copy. Raises ArtefactError where
    no index is there, StorageError where it cannot be read."""
    return fetched(ObjectPath.parse(place), cache or cache_folder(), progress) if is_address(place) else Path(place)


def fetched(address: ObjectPath, cache: Path, progress: Progress | None = None) -> Path:
    """A copy of the current version of an index, in a folder of `cache`. Raises as `local_index`."""
    pointer = _pointer(address)
    if pointer is None:
        raise ArtefactError(f"{address}: no index of documents is here; bessemer index DOCS {address} makes one")
    copy = _copy_of(address, cache)
    with locked_folder(copy, PATIENCE):
        _bring_up_to_date(address, pointer, copy, progress or Silent())
    return copy


@contextmanager
def remote_index(address: ObjectPath, cache: Path, progress: Progress | None = None) -> Iterator[Path]:
    """A copy of an index that is built or updated in the block, and uploaded at its end; empty where none is there yet. Raises
    ArtefactError where another process works on the copy, or has uploaded another version meanwhile."""
    shown, copy = progress or Silent(), _copy_of(address, cache)
    before = _pointer(address)
    with locked_folder(copy.with_name(f"{copy.name}.upload"), PATIENCE):
        with locked_folder(copy, PATIENCE):
            if before is None:
                # of an index that was removed
                _base_of(copy).unlink(missing_ok=True)
            else:
                _bring_up_to_date(address, before, copy, shown)
        yield copy
        published(copy, address, before, shown)


def published(folder: Path, address: ObjectPath, before: Mapping[str, Any] | None, progress: Progress | None = None) -> None:
    """Upload the version of a copy, if it is not that of the pointer. before: the pointer that the version was built from.
    Raises ArtefactError where the pointer is another one now, or objects are not what was built."""
    values = dict(read_json(folder / INDEX, "index"))
    for name in _BESIDE:
        if (folder / name).exists():
            (address / name).upload(folder / name)
    if before is not None and _base(folder) == before[_PLACE] and values["version"] == before["version"]:
        return
    place = f"{VERSIONS}/{values['version']}-{uuid.uuid4().hex[:12]}"
    version = folder / VERSIONS / str(values["version"])
    files = {path.relative_to(version).as_posix(): path for path in sorted(version.rglob("*")) if path.is_file()}
    with (progress or Silent()).task("upload", len(files), "files") as task:
        for name, path in files.items():
            (address / place / name).upload(path)
            task.advance(1)
    start = len((address / place).key) + 1
    there = {one.key[start:]: one.size for one in (address / place).find()}
    if there != {name: path.stat().st_size for name, path in files.items()}:
        raise ArtefactError(f"{address / place}: the objects are not those that were uploaded; run again")
    if _pointer(address) != before:
        (address / place).remove_all()
        raise ArtefactError(f"{address}: another process has written this index meanwhile; run again, on its version")
    values[_PLACE] = place
    (address / INDEX).write_text(json.dumps(values), encoding="utf-8")
    write_json(_base_of(folder), {_PLACE: place})
    _remove_old(address, {place, str((before or {}).get(_PLACE, ""))})


def _pointer(address: ObjectPath) -> dict[str, Any] | None:
    """What the pointer says; None where there is none. Raises ArtefactError for what is none."""
    try:
        values = json.loads((address / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        values = None
    if not isinstance(values, dict) or not {"version", "config", _PLACE} <= values.keys():
        raise ArtefactError(f"{address / INDEX}: this is no index of documents on object storage")
    return values


def _bring_up_to_date(address: ObjectPath, pointer: Mapping[str, Any], copy: Path, progress: Progress) -> None:
    """Download the version of the pointer, where the copy has another one. The copy's own stays until the new one is whole."""
    for name in _BESIDE:
        (copy / name).unlink(missing_ok=True)
        if (address / name).is_file():
            (address / name).download(copy / name)
    if (copy / INDEX).exists() and _base(copy) == pointer[_PLACE]:
        return
    place = address / str(pointer[_PLACE])
    objects = place.find()
    if not objects:
        raise ArtefactError(f"{place}: the version that the index names is not there; index the documents again")
    version = copy / VERSIONS / str(pointer["version"])
    arriving = version.with_name(f".arriving-{version.name}")
    shutil.rmtree(arriving, ignore_errors=True)
    start = len(place.key) + 1
    with progress.task("download", len(objects), "files") as task:
        for one in objects:
            one.download(arriving / one.key[start:])
            task.advance(1)
    # of a version that somebody else has built, the copy may have another one of the same number, which nothing names any more
    for path in (_base_of(copy), copy / INDEX):
        path.unlink(missing_ok=True)
    for other in version.parent.iterdir():
        if other != arriving:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    arriving.rename(version)
    write_json(copy / INDEX, dict(pointer))
    write_json(_base_of(copy), {_PLACE: pointer[_PLACE]})


def _base_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.base.json")


def _base(copy: Path) -> str | None:
    """The version of the index on object storage that a copy was made of."""
    path = _base_of(copy)
    return str(read_json(path)[_PLACE]) if path.exists() else None


def _remove_old(address: ObjectPath, kept: set[str]) -> None:
    """Delete the objects of versions but for some: the current one and, since readers may be fetching it, the one before."""
    start = len(address.key) + 1
    for place in {"/".join(one.key[start:].split("/")[:2]) for one in (address / VERSIONS).find()} - kept:
        (address / place).remove_all()


def _copy_of(address: ObjectPath, cache: Path) -> Path:
    return cache / f"{address.name}-{hash_value(str(address))[:12]}"
