"""Files on object storage, `s3://`, `gs://` and `az://`, with as much of `pathlib.Path` as the packages use.

Code that takes a `Place` opens, lists and writes files on a disk and on object storage alike. Objects are uploaded atomically,
as by a rename on a disk. The storage libraries read credentials and endpoints from the environment of each process
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). An `ObjectPath` is only an address, so credentials reach no other machine and no
manifest.
"""

from __future__ import annotations

import fnmatch
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bessemer.core.environment import install_extra
from bessemer.core.errors import BessemerError, ConfigError, StorageError
from bessemer.core.hashing import hash_file

#: Scheme of an address → the package that `fsspec` needs for it, and the extra that installs it.
SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "az": ("adlfs", "az")}

#: Bytes fetched at once of an object that is streamed, and of one that is read at random offsets, as Parquet is.
STREAM_BYTES, RANDOM_ACCESS_BYTES = 8 << 20, 1 << 18


def is_address(text: str) -> bool:
    """Whether a path in a recipe is an address on object storage."""
    return text.partition("://")[0] in SCHEMES and "://" in text


@dataclass(frozen=True, slots=True)
class _Status:
    """The part of `os.stat_result` that objects have."""

    st_size: int


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The address of an object, or of a folder: the common beginning of objects' names.

    An address from a listing has the object's `size` in bytes and its `version` (the storage's entity tag, or the time of
    writing). Reading it raises StorageError when the object was replaced since.
    """

    scheme: str
    #: Bucket and key, without slashes at the ends.
    key: str
    size: int | None = field(default=None, compare=False)
    version: str | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, address: str) -> ObjectPath:
        """The path of an address such as `s3://bucket/folder`. Raises ConfigError for one without a bucket, with `..`, or with
        credentials, which belong in the environment."""
        scheme, _, key = address.partition("://")
        key = "/".join(part for part in key.split("/") if part)
        if scheme not in SCHEMES or not key:
            raise ConfigError(f"{address}: not an address such as s3://bucket/folder ({', '.join(SCHEMES)})")
        if "@" in key.split("/")[0]:
            raise ConfigError(f"{scheme}://…@…: an address holds no credentials; give them in the environment")
        if ".." in key.split("/"):
            raise ConfigError(f"{address}: an address has no '..'")
        return cls(scheme, key)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.scheme, f"{self.key}/{name.strip('/')}")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parents(self) -> list[ObjectPath]:
        """The folders above, the nearest first, the bucket last."""
        return [ObjectPath(self.scheme, str(above)) for above in PurePosixPath(self.key).parents if str(above) != "."]

    @property
    def parent(self) -> ObjectPath:
        """The folder of the object."""
        return self.parents[0]

    def is_symlink(self) -> bool:
        """Always False: there are no links."""
        return False

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with _explained(self):
            return self._storage().isfile(self.key)

    def exists(self) -> bool:
        """Whether there is an object of this name, or a folder with objects."""
        with _explained(self):
            return bool(self._storage().exists(self.key))

    def stat(self) -> _Status:
        """The object's size. Raises FileNotFoundError when there is none."""
        return _Status(self.size if self.size is not None else self.listed().size or 0)

    def listed(self) -> ObjectPath:
        """The same path with the current size and version. Raises FileNotFoundError when there is no such object."""
        with _explained(self):
            return self._known(self._storage().info(self.key))

    def open(self, mode: str = "rb", *, ahead: int = STREAM_BYTES) -> io.RawIOBase:
        """A seekable stream of the object's bytes. ahead: bytes fetched at once.

        Raises FileNotFoundError when there is no object. A failing connection raises StorageError, also while reading, so that
        it is not taken for a damaged file.
        """
        assert mode == "rb", "objects are written by `write_text` and `upload`"
        with _explained(self):
            stream = self._storage().open(self.key, "rb", block_size=ahead, cache_type="readahead")
        current = self._known(stream.details)
        if self.version is not None and (current.size, current.version) != (self.size, self.version):
            stream.close()
            raise StorageError(f"{self}: it was replaced while it was in use; run again")
        return _Reader(self, stream)

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """The whole object, or its bytes from `start` to `end`. Raises FileNotFoundError when there is none."""
        with _explained(self):
            return bytes(self._storage().cat_file(self.key, start=start, end=end))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text. Raises FileNotFoundError when there is none."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Write an object atomically."""
        with _explained(self, writing=True):
            self._storage().pipe_file(self.key, text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Upload a file's content atomically."""
        with _explained(self, writing=True):
            self._storage().put_file(str(file), self.key)

    def download(self, file: Path) -> None:
        """Write the object's content to a file, atomically.

        Raises FileNotFoundError when there is no object, StorageError when it was replaced since it was listed.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(file)
        try:
            with self.open() as stream, partial.open("wb") as copy:
                while block := stream.read(STREAM_BYTES):
                    copy.write(block)
            publish(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def iterdir(self) -> Iterator[ObjectPath]:
        """The objects directly in this folder, sorted, with size and version. Empty when there is no such folder."""
        with _explained(self):
            try:
                entries = self._storage().ls(self.key, detail=True)
            except FileNotFoundError:
                return
        yield from self._objects(entry for entry in entries if entry["name"].strip("/") != self.key)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects directly in this folder whose names match a pattern, sorted."""
        return (place for place in self.iterdir() if fnmatch.fnmatchcase(place.name, pattern))

    def find(self) -> list[ObjectPath]:
        """The object of this name, or all objects below the folder; empty when there is neither. The last part may be a
        pattern, also with `**`."""
        with _explained(self):
            if has_pattern(self.key):
                entries = self._storage().glob(self.key, detail=True)
            else:
                entries = self._storage().find(self.key, detail=True)
        return list(self._objects(entries.values()))

    def remove_all(self) -> None:
        """Remove all objects below this folder."""
        if objects := self.find():
            with _explained(self, writing=True):
                self._storage().rm([place.key for place in objects])

    def _objects(self, entries: Any) -> Iterator[ObjectPath]:
        files = (entry for entry in entries if entry["type"] == "file" and not entry["name"].endswith("/"))
        yield from sorted(map(self._known, files))

    def _known(self, entry: dict[str, Any]) -> ObjectPath:
        tags = (entry.get(name) for name in ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime"))
        version = next((str(tag).strip('"') for tag in tags if tag), None)
        return ObjectPath(self.scheme, entry["name"].strip("/"), int(entry["size"]), version)

    def _storage(self) -> Any:
        package, extra = SCHEMES[self.scheme]
        try:
            return _client(self.scheme, os.getpid())
        except ImportError:
            raise ConfigError(f"{self}: needs the package {package}: {install_extra(extra)}") from None


#: Where a file lies: on a disk or on object storage.
Place = Path | ObjectPath


def has_pattern(name: str) -> bool:
    """Whether a path holds wildcards."""
    return any(wildcard in name for wildcard in "*?[")


def unfinished(place: Place) -> Path:
    """A new local file whose content `publish` moves to `place`: in the same folder on a disk, else a temporary file."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.with_name(f".{place.name}.{os.getpid()}.partial")
    handle, name = tempfile.mkstemp(prefix="bessemer-", suffix=f"-{place.name}")
    os.close(handle)
    return Path(name)


def publish(partial: Path, place: Place) -> None:
    """Move a finished local file to its place, atomically."""
    if isinstance(place, Path):
        partial.replace(place)
    else:
        place.upload(partial)
        partial.unlink()


def fingerprint_of(place: Place) -> Any:
    """An identity of a file's content: its hash, or an object's size and version, which cost no download."""
    return hash_file(place) if isinstance(place, Path) else [place.size, place.version]


def read_range(place: Place, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to `end`."""
    if start == end:
        return b""
    if not isinstance(place, Path):
        return place.read_bytes(start, end)
    with place.open("rb") as stream:
        stream.seek(start)
        return stream.read(end - start)


@contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """A local file with the content of a place. The copy of an object is deleted at the end of the block."""
    if isinstance(place, Path):
        yield place
        return
    copy = unfinished(place)
    try:
        place.download(copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


@cache
def _client(scheme: str, process: int) -> Any:
    """The storage's client, shared by all threads of a process, since creating one takes half a second. Listings are not
    cached: other machines write too."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)


class _Reader(io.RawIOBase):
    """A stream of an object's bytes that raises StorageErrors."""

    def __init__(self, place: ObjectPath, stream: Any) -> None:
        self._place = place
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any, /) -> int:
        try:
            with _explained(self._place):
                data = self._stream.read(len(buffer))
        except FileNotFoundError:
            raise StorageError(f"{self._place}: it was removed while it was in use") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@contextmanager
def _explained(place: ObjectPath, *, writing: bool = False) -> Iterator[None]:
    """Turn the errors of storage libraries into StorageErrors of one line. A missing object stays a FileNotFoundError."""
    try:
        yield
    except BessemerError:
        raise
    except FileNotFoundError as error:
        if writing:
            raise StorageError(f"{place}: cannot be written ({_first_line(error)})") from None
        raise FileNotFoundError(f"{place}: no such object") from None
    except PermissionError as error:
        raise StorageError(f"{place}: access is denied ({_first_line(error)}); check the credentials") from None
    except Exception as error:  # each library has its own errors, for networks, servers and credentials
        raise StorageError(f"{place}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
