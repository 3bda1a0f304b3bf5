"""Files of a distributed checkpoint: written by several processes, read without running code of the file.

Writing: a collective ends the job when a process is late by more than the job's timeout, and a slow disk makes one late. So
processes only plan together. Each writes and hashes its own files and leaves a note, `.part-RANK.json`; rank 0 waits for the
notes, completes the folder and renames it. A process that fails says so in its note, rank 0 tells the others in
`.failed.json`, and all raise.

Reading: PyTorch stores metadata, and values that are not tensors, as pickles, which it opens unrestricted. This reader allows
only the classes that describe a checkpoint, and reads values with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bessemer.core.errors import ArtefactError, BessemerError, CheckpointError, StorageError
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json
from bessemer.distributed.mesh import Mesh
from bessemer.training.checkpoint.state import RANDOM_STATES

#: `_PATIENCE`: seconds without a growing file after which other processes count as dead.
#: `_SAY_EVERY`: seconds between two messages about the wait.
_PATIENCE, _SAY_EVERY = 3600.0, 60.0
#: First and longest pause between two looks at the folder, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0
#: Longest time that a failure's note is left for the other processes to read, in seconds.
_READING = 10.0

_FAILURE = ".failed.json"


class ShardWriter(FileSystemWriter):
    """PyTorch's writer of a folder, which only plans while `save` runs its collectives.

    `write` writes this process's files, and `complete`, on rank 0, the metadata of all processes' files.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Keep the plan for `write`."""
        self._plan, self._planner = plan, planner
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep the metadata for `complete`."""
        self._metadata = metadata

    def write(self) -> list[dict[str, Any]]:
        """Write this process's files; what lies where in them, as JSON-like values."""
        return [_as_plain(result) for result in super().write_data(self._plan, self._planner).wait()]

    def complete(self, written: list[dict[str, Any]]) -> None:
        """Write the metadata. written: what `write` returned, of all processes."""
        super().finish(self._metadata, [[_from_plain(entry) for entry in written]])


def _as_plain(result: WriteResult) -> dict[str, Any]:
    index = result.index
    return {
        "name": index.fqn,
        "offset": None if index.offset is None else list(index.offset),
        "chunk": index.index,
        "bytes": result.size_in_bytes,
        "place": asdict(result.storage_data),
    }


def _from_plain(entry: dict[str, Any]) -> WriteResult:
    index = MetadataIndex(entry["name"], entry["offset"], entry["chunk"])
    return WriteResult(index, entry["bytes"], _StorageInfo(**entry["place"]))


class ProcessNotes:
    """The notes of the processes that write a checkpoint, in its unfinished folder. One process alone leaves none."""

    def __init__(self, unfinished: Path, final: Path, mesh: Mesh, progress: Progress) -> None:
        self._folder = unfinished
        self._final = final
        self._mesh = mesh
        self._progress = progress
        #: The note of another process that failed, once it is read.
        self._read_failure: dict[str, Any] | None = None

    def gathered(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """On rank 0, the parts of all processes by rank, once all have left theirs. Raises StorageError or CheckpointError when
        one failed, and CheckpointError when no file has grown for an hour."""
        parts = {0: own}
        ranks = range(self._mesh.layout.world_size)

        def look() -> bool:
            for rank in ranks:
                if rank not in parts and self._note(rank).exists():
                    parts[rank] = read_json(self._note(rank), "part of a checkpoint")
                    if "failure" in parts[rank]:
                        raise self._error_of(parts[rank])
            return len(parts) == len(ranks)

        self._wait(look, lambda: f"process {next(rank for rank in ranks if rank not in parts)} to write its part")
        return [parts[rank] for rank in ranks]

    def leave(self, part: dict[str, Any]) -> None:
        """On another rank, say that this process has written its part, and wait for rank 0 to publish the folder. Raises as
        `gathered`."""
        begun = self._folder.stat()
        write_json(self._note(self._mesh.rank), part)

        def look() -> bool:
            if (self._folder / _FAILURE).exists():
                raise self._error_of(read_json(self._folder / _FAILURE, "note of a failure"))
            if self._folder.exists():
                return False
            if self._final.exists() and os.path.samestat(begun, self._final.stat()):
                return True
            raise self._error_of({})

        self._wait(look, lambda: "process 0 to publish it")

    def remove_notes(self) -> None:
        """Remove all notes, before the folder is published."""
        for rank in range(1, self._mesh.layout.world_size):
            self._note(rank).unlink(missing_ok=True)

    def give_up(self, error: BaseException) -> BaseException:
        """Tell the others that this process fails with `error`, where they do not know; on rank 0, remove the folder. Returns
        what to raise: where the folder has gone because another process failed, that."""
        if self._mesh.alone:
            shutil.rmtree(self._folder, ignore_errors=True)
            return error
        if self._read_failure is None and not self._mesh.leads and not self._folder.exists():
            return self._error_of({})
        own = {"rank": self._mesh.rank, "failure": str(error), "storage": isinstance(error, StorageError)}
        with suppress(OSError):
            if self._read_failure is None:
                # frees room for the note on a full disk
                for path in self._folder.glob(f"__{self._mesh.rank}_*"):
                    path.unlink()
            # another process's failure is repeated, to show that it was read
            write_json(self._folder / _FAILURE if self._mesh.leads else self._note(self._mesh.rank), self._read_failure or own)
        if self._mesh.leads:
            end = time.monotonic() + _READING
            while time.monotonic() < end and not self._all_know():
                time.sleep(_FIRST_PAUSE)
            shutil.rmtree(self._folder, ignore_errors=True)
        return error

    def _note(self, rank: int) -> Path:
        return self._folder / f".part-{rank}.json"

    def _all_know(self) -> bool:
        """Whether every other process has failed or read of a failure."""
        try:
            notes = [read_json(self._note(rank)) for rank in range(1, self._mesh.layout.world_size)]
        except ArtefactError:
            return False
        return all("failure" in note for note in notes)

    def _error_of(self, note: dict[str, Any]) -> BessemerError:
        self._read_failure = note
        if note.get("storage"):
            return StorageError(note["failure"])
        who, why = (f"process {note['rank']}", f" ({note['failure']})") if note else ("another process", "")
        return CheckpointError(f"{self._final}: {who} could not write its part of this checkpoint{why}; see its log")

    def _wait(self, look: Callable[[], bool], waiting: Callable[[], str]) -> None:
        """Until `look`, or until no file has grown for long."""
        pause = _FIRST_PAUSE
        size: int | None = None
        said = grown = measured = time.monotonic()
        while not look():
            now = time.monotonic()
            if now - measured >= _PATIENCE / 60:
                measured, before, size = now, size, self._size()
                if size != before:
                    grown = now
                elif now - grown > _PATIENCE:
                    raise CheckpointError(
                        f"{self._final}: waited for {waiting()}, but no file of this checkpoint grows any more"
                    )
            if now - said >= _SAY_EVERY:
                said = now
                self._progress.say(f"  {self._final.name}: waiting for {waiting()}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _size(self) -> int:
        """Bytes of all files so far."""
        total = 0
        for path in self._folder.glob("*"):
            with suppress(OSError):
                total += path.stat().st_size
        return total


#: The classes and functions of PyTorch's metadata, by module.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        name
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
        if hasattr(metadata, name)
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"} & set(vars(filesystem)),
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 pickles paths under another module's name
        module = "pathlib" if module == "pathlib._local" else module
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


class CheckpointReader(FileSystemReader):
    """PyTorch's reader of a folder with a restricted unpickler for the metadata. Raises CheckpointError for other contents."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                loaded = _MetadataUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: this is not a checkpoint that can be opened safely ({error})") from None
        if not isinstance(loaded, Metadata):
            raise CheckpointError(f"{path}: these are not the metadata of a checkpoint")
        if loaded.storage_meta is None:
            loaded.storage_meta = StorageMeta()
        loaded.storage_meta.load_id = self.load_id
        return loaded


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner, restricted to plain values and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{name}: a checkpoint's value is neither a tensor nor a plain value ({error})") from None
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def read_checkpoint(values: dict[str, Any], folder: Path, *, alone: bool, group: Any = None) -> None:
    """Load a checkpoint into nested `values`. Raises CheckpointError when it holds more than tensors and plain values.

    Random states that the checkpoint does not hold are taken out of `values`: it may be of fewer ranks, of another device, or
    of an earlier version.
    """
    # read before `load`, because PyTorch wraps errors that are raised inside it
    stored = CheckpointReader(folder).read_metadata().state_dict_metadata
    states = values.get(RANDOM_STATES, {})
    for name in [name for name in states if f"{RANDOM_STATES}.{name}" not in stored]:
        del states[name]
    try:
        load(values, storage_reader=CheckpointReader(folder), planner=_Planner(), no_dist=alone, process_group=group)
    except CheckpointException as error:
        causes = (cause for cause, _ in error.failures.values())
        known = next((cause for cause in causes if isinstance(cause, CheckpointError)), None)
        if known is None:
            raise
        raise CheckpointError(f"{folder}: {known}") from None


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def check_plain(values: Any, name: str = "") -> None:
    """Raise CheckpointError when nested values hold something that `read_checkpoint` would refuse."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_plain(value, f"{name}.{key}" if name else str(key))
    elif type(values) in (list, tuple, set):
        for value in values:
            check_plain(value, name)
    elif not isinstance(values, torch.Tensor) and type(values) not in _PLAIN:
        raise CheckpointError(
            f"{name}: a checkpoint holds tensors and plain values, and this is a {type(values).__name__}; keep one of those "
            "in the optimizer's state"
        )
