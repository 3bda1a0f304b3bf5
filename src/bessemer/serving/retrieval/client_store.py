"""A vector store that a client made: files come and go, and an index follows.

It lies in a folder: `store.json`, and `index-N`, the index of its files. Files are read and indexed in a thread, one store at a
time; added files update the index in place, and after a deletion it is built anew in another folder, so that nothing of a
deleted file stays on disk.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from bessemer.core.errors import ArtefactError, BessemerError
from bessemer.core.store import check_format, read_json, write_json
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.embed import Embedder
from bessemer.retrieval.index import INDEX, IndexedDocument, build_index
from bessemer.retrieval.store import Filter, Passage
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.retrieval.indexes import NO_MODELS, SearchModels, ServedIndex, find, passages_of
from bessemer.serving.retrieval.protocol import Value, Wanted
from bessemer.serving.retrieval.uploads import Upload, Uploads
from bessemer.serving.runtime.bodies import ApiError, overloaded

#: The file in a store's folder that says what it is.
RECORD = "store.json"
_FORMAT = 1
_log = logging.getLogger(__name__)
Status = Literal["in_progress", "completed", "failed"]


@dataclass
class StoreFile:
    """A file in a store. size: bytes. created: when it was added, in seconds since 1970. error: why it failed."""

    id: str
    filename: str
    size: int
    created: int
    status: Status = "completed"
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class StoreEmbedder:
    """What clients' stores are embedded with. name: as `IndexConfig` has it."""

    name: str
    embedder: Embedder | None


class ClientStore:
    """A store that a client made. Its routes run on the event loop; `update` runs in a thread."""

    is_served = False

    def __init__(
        self,
        folder: Path,
        uploads: Uploads,
        embedder: Callable[[], StoreEmbedder],
        record: Mapping[str, Any],
        models: SearchModels = NO_MODELS,
    ) -> None:
        """record: as `store.json` has it. models: of searches."""
        self.id: str = record["id"]
        self.owner: str = record["owner"]
        self.name: str = record["name"]
        self.created: int = record["created"]
        self.metadata: Mapping[str, str] = record["metadata"]
        self._number: int = record["index"]
        self._entries = {id: StoreFile(**values) for id, values in record["files"].items()}
        self._folder = folder
        self._uploads = uploads
        self._embedder = embedder
        self._models = models
        self._lock = Lock()
        self._loop = asyncio.get_running_loop()
        self._index: ServedIndex | None = None
        #: Whether the index holds files that were deleted, and whether anything has changed since it was built.
        self._holds_deleted: bool = record["holds_deleted"]
        self._is_stale = self._holds_deleted or any(file.status == "in_progress" for file in self._entries.values())
        self.task: asyncio.Task[None] | None = None
        # what a build that was ended left behind
        for place in folder.glob("index-*"):
            if place != self._place(self._number):
                shutil.rmtree(place, ignore_errors=True)
        if self._is_stale:
            self.update_soon()

    def files(self, groups: frozenset[str] = frozenset()) -> list[StoreFile]:
        return list(self._entries.values())

    def add(self, uploads: Sequence[tuple[Upload, Mapping[str, Value]]]) -> list[StoreFile]:
        """Add files, each with its attributes, and begin to index them."""
        now = int(time.time())
        added = [StoreFile(one.id, one.filename, one.size, now, "in_progress", values) for one, values in uploads]
        with self._lock:
            self._entries |= {file.id: file for file in added}
            self._is_stale = True
        self.save()
        self.update_soon()
        return added

    def remove(self, file: str) -> None:
        """Take a file out, and begin to build the index without it. It is not found any more from now on."""
        with self._lock:
            del self._entries[file]
            self._is_stale = self._holds_deleted = True
        self.save()
        self.update_soon()

    def save(self) -> None:
        """Write the record."""
        with self._lock:
            files = {id: asdict(file) for id, file in self._entries.items()}
            record = {
                "format": _FORMAT,
                "id": self.id,
                "owner": self.owner,
                "name": self.name,
                "created": self.created,
                "metadata": dict(self.metadata),
                "index": self._number,
                "holds_deleted": self._holds_deleted,
                "files": files,
            }
            write_json(self._folder / RECORD, record)

    def search(self, query: str, wanted: Wanted, groups: frozenset[str]) -> list[ServedHit]:
        index = self._served()
        ready = {file.id: file for file in self.files() if file.status == "completed"}
        if wanted.filters is not None:
            ready = {id: file for id, file in ready.items() if wanted.filters.holds(file.attributes)}
        if index is None or not ready:
            return []
        # a file that was taken out may be in the index still
        where = Filter(documents=[f"{id}/*" for id in ready])
        try:
            hits = find(index.current(), self.id, query, wanted, where, _by_upload)
        except Exception:
            newer = self._served()
            if newer is None or newer is index:
                raise
            # the index was built anew meanwhile, and the earlier one is gone
            hits = find(newer.current(), self.id, query, wanted, where, _by_upload)
        return [replace(hit, filename=ready[hit.file].filename) for hit in hits]

    def passages(self, file: str, groups: frozenset[str]) -> list[Passage]:
        index = self._served()
        if index is None or file not in self._entries:
            return []
        return passages_of(index.current(), [one for place, one in index.files().items() if place.startswith(f"{file}/")])

    def path(self, file: str, groups: frozenset[str]) -> Path | None:
        return self._uploads.path(self._uploads.find(file, self.owner)) if file in self._entries else None

    def _served(self) -> ServedIndex | None:
        """The index; None before any file is in it. Where another embedder made it, it is made anew, and until then ApiError
        (503) is raised."""
        with self._lock:
            place = self._place(self._number)
            if self._index is None and (place / INDEX).exists():
                try:
                    self._index = ServedIndex(self.id, place, self._embedder().embedder, self._models)
                except ArtefactError:
                    self._is_stale = True
                    self._loop.call_soon_threadsafe(self.update_soon)
                    raise overloaded(f"the vector store '{self.id}' is being indexed anew; try again in a moment") from None
            return self._index

    def update_soon(self) -> None:
        """Bring the index up to date, in a thread. Call it on the event loop."""
        if self.task is None or self.task.done():
            self.task = self._loop.create_task(self._update())

    async def _update(self) -> None:
        while self._is_stale:
            self._is_stale = False
            await asyncio.to_thread(self.update)

    def update(self) -> None:
        """Read the files and index them. Files that cannot be read are marked as failed; no error is raised."""
        with self._lock:
            entries = {id: file for id, file in self._entries.items() if file.status != "failed"}
            is_new = self._holds_deleted
            self._holds_deleted = False
        number = self._number + is_new
        failed: dict[str, str] = {}
        documents: list[IndexedDocument] = []
        for id in entries:
            try:
                documents += self._uploads.documents(self._uploads.find(id, self.owner))
            except (BessemerError, ApiError) as error:
                failed[id] = str(error)
        try:
            if documents:
                chosen = self._embedder()
                place = self._place(number)
                build_index(documents, place, IndexConfig(embedder=chosen.name), embedder=chosen.embedder)
        except Exception as error:
            if not isinstance(error, BessemerError):
                _log.exception("the store %s cannot be indexed", self.id)
            reason = str(error).replace(str(self._folder), self.name) if isinstance(error, BessemerError) else ""
            reason = reason or "it cannot be indexed; the server's log says why"
            failed |= {id: reason for id, file in entries.items() if file.status == "in_progress"}
            with self._lock:
                self._holds_deleted = self._holds_deleted or is_new
            number = self._number
        self._take_over(number, entries, failed)

    def _take_over(self, number: int, entries: Mapping[str, StoreFile], failed: Mapping[str, str]) -> None:
        """Read the index of another number, and mark what is in it."""
        with self._lock:
            before, self._number = self._number, number
            if before != number:
                self._index = None
            for id, file in entries.items():
                file.status = "failed" if id in failed else "completed"
                file.error = failed.get(id, "")
        self.save()
        if before != number:
            shutil.rmtree(self._place(before), ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self._folder / f"index-{number}"


def read_record(path: Path) -> Mapping[str, Any]:
    """The record of a store. Raises ArtefactError for a damaged one."""
    record: Mapping[str, Any] = read_json(path, "vector store")
    check_format(record.get("format"), _FORMAT, path, "vector store")
    return record


def _by_upload(passage: Passage) -> tuple[str, str]:
    return passage.document.partition("/")[0], ""
