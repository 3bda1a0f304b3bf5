"""Pictures of data sets as they are published: Parquet with the bytes in it, and JSON or CSV beside a folder of files.

A task over a thousand pages must not hold them in memory: a picture of a row is read when it is asked about. What a row says of
it, whether the file is there and whether its header is that of a picture that is read, is looked at before anything is
computed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.records import TABLES, Record, read_records
from bessemer.model.vision.pictures import picture_size

if TYPE_CHECKING:
    import pyarrow

#: Rows of Parquet whose pictures are in memory at once while they are looked through.
_ROWS_AT_ONCE = 32


class StoredPicture(str):
    """A picture in a file of the user's, read when it is needed. As a text it is the digest of its bytes: questions with the
    same pictures are the same wherever their files lie.

    place: its file and row, for messages.
    """

    __slots__ = ("_read", "place")

    place: str
    _read: Callable[[], bytes]

    @classmethod
    def of(cls, data: bytes, place: str, read: Callable[[], bytes]) -> StoredPicture:
        """A picture by its bytes, which are not kept. Raises ArtefactError for what a header shows to be none that is read."""
        try:
            picture_size(data, "its picture")
        except RequestError as error:
            raise ArtefactError(f"{place}: {error}") from None
        stored = cls(f"sha256:{hashlib.sha256(data).hexdigest()}")
        stored.place, stored._read = place, read
        return stored

    def read(self) -> bytes:
        """The bytes of its file."""
        return self._read()


class DataFile(NamedTuple):
    """A file of rows, and the folder that names it: that of `--data`, or of the task file."""

    path: Path
    folder: Path

    @property
    def is_parquet(self) -> bool:
        """Whether its pictures are in it."""
        return self.path.suffix.lower() == ".parquet"


def find_files(names: Sequence[str], folders: Sequence[Path], *, of_one_folder: bool) -> list[DataFile]:
    """The files of a task's data: those of the first of the names or patterns (`**/val*.parquet`) that fits any.

    folders: looked through in turn; one that is a file is the data. A name may be that of a folder, whose tables are all meant.
    of_one_folder: whether files of several folders cannot be of one data set. Raises ArtefactError where there are none.
    """
    for folder in folders:
        if folder.is_file():
            return [DataFile(folder, folder.parent)]
        for name in names:
            found = [DataFile(path, folder) for path in sorted(_matches(folder, name))]
            if of_one_folder and len(within := sorted({str(one.path.parent) for one in found})) > 1:
                raise ArtefactError(f"{name} fits files in {' and '.join(within[:3])}; name one of them with --data")
            if found:
                return found
    looked = " and ".join(map(str, folders))
    raise ArtefactError(f"there is no {' or '.join(names)} in {looked}; say where the data lies with --data FILE or FOLDER")


def _matches(folder: Path, name: str) -> Iterator[Path]:
    if "*" in name:
        yield from (path for path in folder.glob(name) if path.is_file() and path.suffix.lower() in TABLES)
    elif (path := folder / name).is_dir():
        yield from (path for path in path.rglob("*") if path.is_file() and path.suffix.lower() in TABLES)
    elif path.is_file():
        yield path


def picture_records(file: DataFile, columns: Sequence[str], images: Path | None) -> Iterator[Record]:
    """The rows of a file with a `StoredPicture` under each of the columns that hold one; other columns as they are.

    images: where paths of pictures begin; None: in the folder of the file. Raises ArtefactError, with the row, for a picture
    that is not there, leads out of its folder, or is none that is read.
    """
    if file.is_parquet:
        yield from _parquet_records(file.path, columns)
        return
    folder = PictureFolder(file.path.parent if images is None else images, None if images is not None else file.folder)
    for record in read_records(file.path):
        given = [name for name in columns if isinstance(value := record.values.get(name), str) and value.strip()]
        shown = {name: folder.picture(record, name) for name in given}
        yield Record({**record.values, **shown}, record.number, record.place)


class PictureFolder:
    """Pictures by the paths that rows give."""

    def __init__(self, folder: Path, around: Path | None) -> None:
        """folder: where paths begin. around: a folder in which files are looked for by their names alone, where a path leads to
        none: published rows say `COCO_val2014_000000310196.jpg`, whichever folder the pictures were unpacked into."""
        self._folder = folder
        self._around = around
        self._by_name: dict[str, list[Path]] | None = None
        self._stored: dict[Path, StoredPicture] = {}

    def picture(self, record: Record, name: str) -> StoredPicture:
        """The picture of a row's field. Raises ArtefactError."""
        given = record.text(name)
        if "://" in given[:12] or given.startswith("data:"):
            raise record.error(f"{name!r} is {given[:60]!r}; a path to a picture is needed, nothing is fetched")
        parts = PurePosixPath(given.replace("\\", "/")).parts
        if not parts or parts[0].endswith((":", "/")) or ".." in parts:
            raise record.error(f"{name!r} is {given[:60]!r}, which leads out of {self._folder}; a path from there is needed")
        path = self._folder.joinpath(*parts)
        if not path.is_file():
            path = self._named(parts[-1], record, given)
        if path not in self._stored:
            self._stored[path] = StoredPicture.of(path.read_bytes(), f"{record.place}: {given}", path.read_bytes)
        return self._stored[path]

    def _named(self, name: str, record: Record, given: str) -> Path:
        found = []
        if self._around is not None:
            if self._by_name is None:
                self._by_name = {}
                for folder, _, files in os.walk(self._around):
                    for file in files:
                        self._by_name.setdefault(file, []).append(Path(folder, file))
            found = self._by_name.get(name, [])
        if len(found) > 1:
            raise record.error(f"there are {found[0]} and {found[1]}; say with `images` which folder the pictures lie in")
        if not found:
            raise record.error(f"there is no picture {given!r} in {self._folder}; say with `images` where they lie")
        return found[0]


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                start = number
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group]):
                    for values in batch.to_pylist():
                        place = f"{path}, row {number}"
                        shown = {
                            name: _of_cell(values[name], _Cell(path, group, number - start, name), place)
                            for name in columns
                            if values.get(name) is not None
                        }
                        yield Record(values | shown, number, place)
                        number += 1
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; check the path") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtefactError(f"{path}: is not Parquet, or damaged ({error})") from None


class _Cell(NamedTuple):
    """Where a picture stands in a file of Parquet."""

    path: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes of the picture."""
        return _bytes_in(_column(self.path, self.group, self.column)[self.row].as_py()) or b""


def _of_cell(value: Any, cell: _Cell, place: str) -> StoredPicture:
    data = _bytes_in(value)
    if data is None:
        raise ArtefactError(f"{place}: {cell.column!r} holds no bytes of a picture, it is a {type(value).__name__}")
    return StoredPicture.of(data, f"{place}, {cell.column}", cell.read)


def _bytes_in(value: Any) -> bytes | None:
    """The bytes of a picture as `datasets` stores it, {"bytes": …, "path": …}, or as they are; None where there are none."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return bytes(data) if isinstance(data, bytes | bytearray | memoryview) else None


# questions are asked in the order of their rows, so few groups are needed at a time
@lru_cache(maxsize=2)
def _column(path: Path, group: int, column: str) -> pyarrow.ChunkedArray:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)
