"""A folder or a file that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bessemer.core.errors import ArtefactError, writing_to


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to work in, which becomes `folder` when the block ends well and vanishes when it does not.

    Raises ArtefactError when `folder` is there already and holds something, StorageError when it cannot be written.
    """
    refuse_full(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing_to(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            # another process may have made it meanwhile
            refuse_full(folder)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process works in meanwhile, and that goes on where an earlier one stopped.

    Raises ArtefactError where another process is at work there.
    """
    import filelock

    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # beside it: a folder is refused that holds something else
    lock = filelock.FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ArtefactError(
            f"{folder}: another process is at work in this folder; wait until it has ended, or name another folder"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path`, over what was there, when the block ends well and vanishes when it does not.

    Raises StorageError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing_to(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def refuse_full(folder: Path) -> None:
    """Raise ArtefactError when `folder` is there and holds something, or is a file: asked before long work as well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder}: exists already and is not empty; name another folder")
