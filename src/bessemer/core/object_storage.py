"""Files on object storage, `s3://`, `gs://` and `az://`, with as much of `pathlib.Path` as the packages use.

What can be read from either is a `Place`: code that takes one opens, lists and writes without asking which it is. Objects
are put whole, so a place holds a whole file or none, as with a rename on a disk. Credentials and endpoints are the storage
libraries' own affair (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, … in the environment of the reading process): an `ObjectPath` is
an address and nothing more, so none travels to other machines or into manifests.
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

#: Read at once, in bytes: of what is streamed; of what is read in places that its footer names.
STREAMED, IN_PLACES = 8 << 20, 1 << 18


def is_address(text: str) -> bool:
    """Whether a path of a recipe is on object storage."""
    return text.partition("://")[0] in SCHEMES and "://" in text


@dataclass(frozen=True, slots=True)
class _Status:
    """Of `os.stat_result` what is known of an object."""

    st_size: int


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or what objects have in common at the beginning of their names: a folder.

    One that comes from a listing knows the object's `size` in bytes and its `version` (the storage's entity tag, or when it
    was written); reading it then raises StorageError when another has taken its place.
    """

    scheme: str
    #: Bucket and key, without slashes at the ends.
    key: str
    size: int | None = field(default=None, compare=False)
    version: str | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, address: str) -> ObjectPath:
        """The place of an address such as `s3://bucket/folder`. Raises ConfigError for one without a bucket, or with more
        than names in it: credentials belong into the environment."""
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
        """The folder that it lies in."""
        return self.parents[0]

    def is_symlink(self) -> bool:
        """Never: objects lead nowhere."""
        return False

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with _explained(self):
            return self._storage().isfile(self.key)

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        with _explained(self):
            return bool(self._storage().exists(self.key))

    def stat(self) -> _Status:
        """The object's size. Raises FileNotFoundError when there is none."""
        return _Status(self.size if self.size is not None else self.listed().size or 0)

    def listed(self) -> ObjectPath:
        """The same with size and version, as they are now. Raises FileNotFoundError when there is no such object."""
        with _explained(self):
            return self._known(self._storage().info(self.key))

    def open(self, mode: str = "rb", *, ahead: int = STREAMED) -> io.RawIOBase:
        """The object's bytes, seekable, `ahead` of them fetched at once.

        Raises FileNotFoundError when there is none; that it cannot be reached is a StorageError, here and while it is read,
        so that a broken connection is not taken for a damaged file.
        """
        assert mode == "rb", "objects are put whole"
        with _explained(self):
            stream = self._storage().open(self.key, "rb", block_size=ahead, cache_type="readahead")
        found = self._known(stream.details)
        if self.version is not None and (found.size, found.version) != (self.size, self.version):
            stream.close()
            raise StorageError(f"{self}: it was replaced while it was in use; run again")
        return _Reader(self, stream)

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """All of it, or the bytes from `start` to `end`. Raises FileNotFoundError when there is none."""
        with _explained(self):
            return bytes(self._storage().cat_file(self.key, start=start, end=end))

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it as text. Raises FileNotFoundError when there is none."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Put an object that is whole or absent."""
        with _explained(self, writing=True):
            self._storage().pipe_file(self.key, text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Put a file's content here, whole or not at all."""
        with _explained(self, writing=True):
            self._storage().put_file(str(file), self.key)

    def download(self, file: Path) -> None:
        """Write the object's content to a file, which is there whole or not at all.

        Raises FileNotFoundError when there is none, StorageError when it is not the one that was listed.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(file)
        try:
            with self.open() as stream, partial.open("wb") as copy:
                while block := stream.read(STREAMED):
                    copy.write(block)
            publish(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def iterdir(self) -> Iterator[ObjectPath]:
        """The objects right in this folder, sorted, with what is known of them. None where there is no such folder."""
        with _explained(self):
            try:
                entries = self._storage().ls(self.key, detail=True)
            except FileNotFoundError:
                return
        yield from self._objects(entry for entry in entries if entry["name"].strip("/") != self.key)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects right in this folder whose name fits a pattern, sorted."""
        return (place for place in self.iterdir() if fnmatch.fnmatchcase(place.name, pattern))

    def find(self) -> list[ObjectPath]:
        """The object of this name, or all objects below the folder; none where there is neither. Its last part may be a
        pattern, also with `**`."""
        with _explained(self):
            if has_pattern(self.key):
                found = self._storage().glob(self.key, detail=True)
            else:
                found = self._storage().find(self.key, detail=True)
        return list(self._objects(found.values()))

    def remove_all(self) -> None:
        """Remove all objects below this folder."""
        if found := self.find():
            with _explained(self, writing=True):
                self._storage().rm([place.key for place in found])

    def _objects(self, entries: Any) -> Iterator[ObjectPath]:
        found = (self._known(entry) for entry in entries if entry["type"] == "file" and not entry["name"].endswith("/"))
        yield from sorted(found)

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
    """A new local file to write what will be `place`: beside it, or among this machine's temporary files. See `publish`."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.with_name(f".{place.name}.{os.getpid()}.partial")
    handle, name = tempfile.mkstemp(prefix="bessemer-", suffix=f"-{place.name}")
    os.close(handle)
    return Path(name)


def publish(partial: Path, place: Place) -> None:
    """Give a finished file its place, whole or not at all; the local one is gone then."""
    if isinstance(place, Path):
        partial.replace(place)
    else:
        place.upload(partial)
        partial.unlink()


def fingerprint_of(place: Place) -> Any:
    """What tells a file's content from another's: a hash of it; of an object its size and version, for nothing is read."""
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
def at_hand(place: Place) -> Iterator[Path]:
    """A file of this machine with the content of a place, for what reads nothing else: a copy goes when the block ends."""
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
    """The storage's client, one for all threads of a process: making one takes half a second, and it may be used by all.
    Listings are not kept, since others write there too."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)


class _Reader(io.RawIOBase):
    """An object's bytes; what goes wrong on the way is a StorageError."""

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
    """What storage libraries raise, as a StorageError of one line; that there is no object stays a FileNotFoundError."""
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
