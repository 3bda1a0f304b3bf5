"""How several processes write one checkpoint: each its part, and none waits for another in a collective.

A collective ends the job when a process is late by more than the job's timeout, and a slow disk makes one late. So processes
only plan together. Then each writes and hashes its own files and leaves a note beside them, `.part-RANK.json`. Rank 0 waits for
the notes, completes the folder and gives it its final name, for which the others wait. A process that fails says so in its
note, rank 0 tells the others in `.failed.json`, and all raise.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bessemer.core.errors import ArtefactError, BessemerError, CheckpointError, StorageError
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json
from bessemer.distributed.mesh import Mesh

#: Seconds without a file that grows after which the others are given up, and between lines about the wait for them.
_PATIENCE, _SAY_EVERY = 3600.0, 60.0
#: Seconds between two looks, at first and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0
#: Seconds that a failure is left to be read, where not all have read it before.
_READING = 10.0

_FAILURE = ".failed.json"


class PartWriter(FileSystemWriter):
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


class Parts:
    """The notes of the processes that write a checkpoint, in its unfinished folder. One process alone leaves none."""

    def __init__(self, unfinished: Path, final: Path, mesh: Mesh, progress: Progress) -> None:
        self._folder = unfinished
        self._final = final
        self._mesh = mesh
        self._progress = progress
        #: What another process says that it failed with.
        self._told: dict[str, Any] | None = None

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
        if self._told is None and not self._mesh.leads and not self._folder.exists():
            return self._error_of({})
        own = {"rank": self._mesh.rank, "failure": str(error), "storage": isinstance(error, StorageError)}
        with suppress(OSError):
            if self._told is None:
                # so that there is room for the note on a full disk
                for path in self._folder.glob(f"__{self._mesh.rank}_*"):
                    path.unlink()
            # that of another process too: a sign that it was read
            write_json(self._folder / _FAILURE if self._mesh.leads else self._note(self._mesh.rank), self._told or own)
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
        self._told = note
        if note.get("storage"):
            return StorageError(note["failure"])
        who, why = (f"process {note['rank']}", f" ({note['failure']})") if note else ("another process", "")
        return CheckpointError(f"{self._final}: {who} could not write its part of this checkpoint{why}; see its log")

    def _wait(self, look: Callable[[], bool], waiting: Callable[[], str]) -> None:
        """Until `look`, or until no file has grown for long."""
        pause, size = _FIRST_PAUSE, -1
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
