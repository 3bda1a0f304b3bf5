"""Documents on object storage: an index of their objects in the stage's folder, and copies in the cache as local files.

A data stage with `storage: s3://bucket/folder` writes its parts below `s3://bucket/folder/STAGE-KEY`, from whichever machine
works on them; what it leaves to its next run lies there too. `documents/objects.json` in the stage's own folder gives for each
part its address, its size and the version of the object.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bessemer.core.concurrency import thread_pool
from bessemer.core.errors import ArtefactError, StorageError
from bessemer.core.object_storage import ObjectPath, Place
from bessemer.core.stage import StageContext
from bessemer.core.store import artefact_name, check_format, read_json, will_be_published, write_json, write_text

INDEX = "objects.json"
#: Folder of finished work. It stays until the stage's outputs are hashed, since a run may be killed during that too.
SCRATCH = ".checkpoints"
#: File in that folder: the address below which the stage's parts and checkpoints lie.
ADDRESS = "storage"
_FORMAT = 1
_DOWNLOADS_AT_ONCE = 8


def working_place(storage: str | None, out: Path) -> Place:
    """The place of a stage's outputs: the stage's folder, or below `storage` a folder of the same name."""
    return out.absolute() if storage is None else ObjectPath.parse(storage) / artefact_name(out)


def begin(storage: str | None, out: Path) -> tuple[Place, Place]:
    """Where a stage writes its outputs (`working_place`), and the folder there of what it has done, ready to be written to. The
    stage's own folder notes the address."""
    place = working_place(storage, out)
    (out / SCRATCH).mkdir(parents=True, exist_ok=True)
    if not isinstance(place, Path):
        write_text(out / SCRATCH / ADDRESS, f"{place}\n")
    return place, place / SCRATCH


def finish(place: Place, out: Path, sides: Iterable[str], parts: Iterable[str]) -> None:
    """After the last part: index what lies on object storage, and remove what was kept for a next run.

    For outputs in a store's folder that is left to `Store.publish`, which removes it after hashing them; of what lies on object
    storage the index alone is hashed.
    """
    if not isinstance(place, Path):
        names = list(parts)
        for side in sides:
            write_index(out / side, place / side, names)
        (place / SCRATCH).remove_all()
    if not isinstance(place, Path) or not will_be_published(out):
        shutil.rmtree(out / SCRATCH)


def write_index(folder: Path, place: ObjectPath, parts: Iterable[str]) -> None:
    """Say in `folder` which parts of the documents lie at `place`. Raises StorageError when one does not."""
    there = {part.name: part for part in place.iterdir()}
    known = {}
    for name in parts:
        if name not in there:
            raise StorageError(f"{place / name}: it was written and is gone; run again")
        known[name] = {"bytes": there[name].size, "version": there[name].version}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INDEX, {"format": _FORMAT, "place": str(place), "parts": known})


def has_index(folder: Path) -> bool:
    """Whether the documents of a folder lie on object storage."""
    return (folder / INDEX).is_file()


def address_of(stage: Path) -> str | None:
    """Below which address lies what a stage, finished or not, has put on object storage; None where that is nothing."""
    if has_index(stage / "documents"):
        return str(ObjectPath.parse(_index(stage / "documents")["place"]).parent)
    marker = stage / SCRATCH / ADDRESS
    return marker.read_text(encoding="utf-8").strip() if marker.is_file() else None


def stored_parts(folder: Path) -> list[ObjectPath]:
    """The parts of a folder with an index, in order. Raises ArtefactError when the index is damaged."""
    index = _index(folder)
    place = ObjectPath.parse(index["place"])
    return [
        ObjectPath(place.scheme, f"{place.key}/{name}", known["bytes"], known["version"])
        for name, known in sorted(index["parts"].items())
    ]


@contextmanager
def replacing(folder: Path, part: Place) -> Iterator[None]:
    """While a part is written anew: on object storage no version of it is the right one until this is done, and then the new
    one is. Nothing is to do for a file."""
    if isinstance(part, Path):
        yield
        return
    index = _index(folder)
    index["parts"][part.name]["version"] = None
    write_json(folder / INDEX, index)
    yield
    write_index(folder, ObjectPath.parse(index["place"]), index["parts"])


def copies_of(cache: Path, key: str) -> Path:
    """The folder of local copies of a stage's documents, for stages that read files only."""
    return cache / "documents" / key


def documents_at_hand(folder: Path, copies: Path) -> Path:
    """The folder itself where its parts are files; else `copies`, to which those that are not there yet are downloaded. Raises
    ArtefactError when a part is missing, StorageError when it is not the one that was written."""
    if not has_index(folder):
        return folder

    def fetch(part: ObjectPath) -> None:
        copy = copies / part.name
        if copy.exists() and copy.stat().st_size == part.size:
            return
        try:
            part.download(copy)
        except FileNotFoundError:
            raise ArtefactError(
                f"{part}: this part of the documents is missing; delete {folder.parent} and run again"
            ) from None

    with thread_pool(_DOWNLOADS_AT_ONCE) as pool:
        list(pool.map(fetch, stored_parts(folder)))
    return copies


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = read_json(folder / INDEX, "index of documents on object storage")
    check_format(index.get("format"), _FORMAT, folder / INDEX, "index of documents on object storage")
    return index


def documents_of(context: StageContext) -> Path | None:
    """The documents that feed a stage, as files; None where it has none."""
    folder = context.inputs.get("documents")
    return None if folder is None else documents_at(folder, context.cache)


def documents_at(folder: Path, cache: Path) -> Path:
    """Documents as files; `cache` holds the copies of those on object storage."""
    return documents_at_hand(folder, copies_of(cache, folder.parent.name))
