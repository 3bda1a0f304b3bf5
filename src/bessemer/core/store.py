"""The artefact store, and files and folders that are created atomically: complete or absent.

A folder of the store is named by the key of what made it. A stage works in `KEY.partial` under the lock `KEY.lock`; its
manifest is written last and the folder is renamed to `KEY`. So a reader sees a whole artefact or none, a killed stage leaves
its checkpoints where the next run finds them, and a second run that wants the same artefact waits for the first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError, ConfigError, writing_to
from bessemer.core.hashing import hash_file, hash_files
from bessemer.core.object_storage import Place

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Format number of `manifest.json`; raised when its shape changes.
MANIFEST_FORMAT = 1
MANIFEST = "manifest.json"
_POINTER = "bessemer-link: "
_UNFINISHED = ".partial"


def artefact_name(folder: Path) -> str:
    """The name that a stage's folder has, or will have when it is finished."""
    return key_of_folder(folder.name)


def key_of_folder(name: str) -> str:
    """The key of a folder of the store, `KEY` or `KEY.partial`."""
    return name.removesuffix(_UNFINISHED)


def will_be_published(folder: Path) -> bool:
    """Whether a folder is a stage's `KEY.partial`, which `Store.publish` later hashes, clears of scratch files and renames."""
    return folder.name.endswith(_UNFINISHED)


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Write a JSON file atomically: to a temporary name, synchronised, renamed.

    compact: on one line, ten times as fast, for files that no person reads.
    """
    write_text(path, json.dumps(value, indent=None if compact else 2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Place, text: str, *, synchronise: bool = True) -> None:
    """Write a text file atomically; without `synchronise`, a crash of the machine may still damage it. The system's errors name
    the file."""
    if not isinstance(path, Path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            if synchronise:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            # errors of writing name no file
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Place, what: str = "file") -> Any:
    """Read a JSON file. Raises ArtefactError when it is missing or damaged; `what` says what it should be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such {what}") from None
    except (ValueError, RecursionError) as error:
        # no JSON, no UTF-8, an integer of thousands of digits, or nested too deeply
        raise ArtefactError(f"{path}: this {what} is damaged ({error})") from None


def check_format(format: Any, readable: int, place: Path, what: str) -> None:
    """Refuse an artefact whose `format` number this version does not read. Raises ArtefactError."""
    if not isinstance(format, int):
        raise ArtefactError(f"{place}: this is not a {what}: it has no 'format' number")
    if format > readable:
        raise ArtefactError(
            f"{place}: this {what} has format {format}, newer than the {readable} that this version reads; update bessemer"
        )
    if format < readable:
        raise ArtefactError(
            f"{place}: this {what} has the old format {format}, this version reads {readable}; run its recipe again"
        )


@dataclass(frozen=True)
class Artefact:
    """A finished stage's folder."""

    key: str
    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest: how the artefact was made, its metrics, and the hashes of its files."""
        manifest: dict[str, Any] = read_json(self.folder / MANIFEST, "manifest")
        check_format(manifest.get("format"), MANIFEST_FORMAT, self.folder / MANIFEST, "manifest")
        return manifest

    def verify(self) -> None:
        """Compare every file with the hash in the manifest. Raises ArtefactError naming the first that differs."""
        for name, expected in self.manifest["outputs"].items():
            path = self.folder / name
            if not path.exists():
                raise ArtefactError(f"{path}: missing; delete {self.folder} and run the recipe again")
            if path.stat().st_size != expected["bytes"] or hash_file(path) != expected["hash"]:
                raise ArtefactError(f"{path}: differs from what was written; delete {self.folder} and run the recipe again")


class Store:
    """Content-addressed folders below one root, shared by all runs in the same folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str) -> Artefact | None:
        """The finished artefact of this key, or None."""
        folder = self.root / key
        return Artefact(key, folder) if (folder / MANIFEST).exists() else None

    def partial(self, key: str) -> Path:
        """The folder of an unfinished stage of this key."""
        return self.root / f"{key}{_UNFINISHED}"

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the key's lock, exclusively among processes. `on_wait` is called once if another process holds it.

        The system frees the lock when its holder dies, so a killed run never blocks the next.
        """
        with self.try_lock(key) as free:
            if free:
                yield
                return
        on_wait()
        with self._lock(key, wait=True):
            yield

    @contextmanager
    def try_lock(self, key: str) -> Iterator[bool]:
        """Hold the key's lock if no other process holds it; yields whether it is held."""
        with self._lock(key, wait=False) as held:
            yield held

    @contextmanager
    def _lock(self, key: str, *, wait: bool) -> Iterator[bool]:
        import filelock

        self.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.root / f"{key}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0, poll_interval=0.5)
        except filelock.Timeout:
            yield False
            return
        try:
            with _marked(self._mark(key)):
                yield True
        finally:
            lock.release()

    def _mark(self, key: str) -> Path:
        """A second file that the holder locks too, so that others can check it without touching the lock itself."""
        return self.root / f"{key}.held"

    def is_locked(self, key: str) -> bool:
        """Whether some process holds the key's lock now. Asking does not touch the lock itself."""
        return _is_marked(self._mark(key))

    def publish(self, key: str, manifest: dict[str, Any]) -> Artefact:
        """Finish `KEY.partial`: hash its files into the manifest, write that last, rename the folder to `KEY`.

        Entries whose name starts with a dot are the stage's scratch and are removed after hashing, which may take minutes: a
        run killed meanwhile resumes from them. Call it under the lock.
        """
        partial, folder = self.partial(key), self.root / key
        scratch = [path for path in partial.iterdir() if path.name.startswith(".")]
        made = [path for path in partial.iterdir() if path not in scratch and path.name != MANIFEST]
        files = [path for top in made for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
        for path in files:
            _synchronise(path)
        outputs = hash_files(partial, files)
        for path in scratch:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(partial / MANIFEST, {"format": MANIFEST_FORMAT, "key": key, **manifest, "outputs": outputs})
        # it has no manifest (else `find` had returned it): an incomplete copy, made by hand
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
        _synchronise(self.root)
        return Artefact(key, folder)

    def folders(self) -> list[str]:
        """Names of the folders in the store, finished (`KEY`) or not (`KEY.partial`)."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.exists() else []

    def remove(self, name: str) -> None:
        """Delete a folder of the store (`KEY` or `KEY.partial`) and its lock file; the manifest goes first, so that
        no reader takes a half-deleted folder for a whole one. Call it under the lock."""
        folder = self.root / name
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
        (self.root / f"{key_of_folder(name)}.lock").unlink(missing_ok=True)


@contextmanager
def _marked(path: Path) -> Iterator[None]:
    """Hold a file open, and locked where the system can, so that `_is_marked` is true."""
    with path.open("a", encoding="utf-8") as stream:
        if fcntl is not None:
            # may wait for a process that is just in `_is_marked`
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            stream.close()
            path.unlink(missing_ok=True)


def _is_marked(path: Path) -> bool:
    """Whether a living process holds a file by `_marked`. Checks share the lock, so that they do not disturb each other."""
    try:
        if fcntl is None:
            # Windows refuses to delete a file that is open
            path.unlink()
            return False
        with path.open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed. Files that vanish meanwhile are not counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            try:
                total += 0 if path.is_symlink() else path.lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _synchronise(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk. Windows cannot open folders, so nothing happens there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def link(place: Path, target: Path) -> None:
    """Make `place` lead to `target`, replacing what it led to: a relative symbolic link, or a small pointer file
    where links need rights (Windows). `follow` reads both."""
    place.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, place.parent)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(relative, target_is_directory=target.is_dir())
    except OSError:
        temporary.write_text(_POINTER + relative + "\n", encoding="utf-8")
    temporary.replace(place)


def follow(place: Path) -> Path:
    """Where a path leads, through symbolic links and pointer files in any of its parts."""
    current = Path(place.anchor) if place.anchor else Path()
    for part in place.parts[1 if place.anchor else 0 :]:
        current = current / part
        if current.is_file() and not current.is_symlink() and current.stat().st_size < 4096:
            with current.open("rb") as stream:
                head = stream.read(4096)
            if head.startswith(_POINTER.encode()):
                current = current.parent / head.decode()[len(_POINTER) :].strip()
    return Path(os.path.normpath(current.resolve() if current.exists() else current))


class Stopwatch:
    """Seconds of work on an artefact, those of interrupted runs included, kept in its folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".seconds.json"
        self._before = read_json(self._path)["seconds"] if self._path.exists() else 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return float(self._before) + time.monotonic() - self._start

    def save(self) -> None:
        """Keep the figure for the next run."""
        if self._path.parent.exists():
            write_json(self._path, {"seconds": self.seconds})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds, and is deleted when it fails.

    Raises ArtefactError when `folder` exists and is not empty, StorageError when it cannot be written.
    """
    refuse_nonempty(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing_to(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            # another process may have written it meanwhile
            refuse_nonempty(folder)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


#: What a person may be called: the name of their folder, and of their adapter on a server.
_PERSON = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")


def person_folder(people: Path, name: str) -> Path:
    """The folder of a person. Raises ConfigError for a name that is none."""
    if _PERSON.fullmatch(name) is None:
        raise ConfigError(f"{name!r}: a person's name is letters, digits, '_', '.', '@' and '-', at most 64, and no path")
    return people / name


@contextmanager
def locked_folder(folder: Path, seconds: float = 0) -> Iterator[None]:
    """Lock a folder against other processes during the block. seconds: how long to wait for one that holds it.

    Raises ArtefactError when another process holds it for longer.
    """
    import filelock

    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # not inside the folder, which may have to be empty
    lock = filelock.FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=seconds)
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
    """A temporary file that replaces `path` when the block succeeds, and is deleted when it fails.

    Raises StorageError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing_to(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def refuse_nonempty(folder: Path) -> None:
    """Raise ArtefactError when `folder` is a file, or a folder with something in it. Also called before long work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder}: exists already and is not empty; name another folder")
