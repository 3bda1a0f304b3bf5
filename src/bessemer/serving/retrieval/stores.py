"""Vector stores: the server's own indexes, which are read, and clients' stores, which follow their files (`client_store.py`).

A client's store is its owner's alone. Of the server's indexes a caller sees the documents of no group and of its own groups.
Nothing else of them is in hits, lists or counts; a document that a caller may not see is one that there is not.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.retrieval.embed import Embedder, open_embedder, packaged_minilm
from bessemer.retrieval.index import INDEX, OpenIndex
from bessemer.retrieval.remote import local_index
from bessemer.retrieval.search import MOST_CHARACTERS, without_copies
from bessemer.retrieval.store import Filter, Passage
from bessemer.serving.config import STORES
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.retrieval.client_store import RECORD, ClientStore, StoreEmbedder, StoreFile, read_record
from bessemer.serving.retrieval.indexes import (
    NO_MODELS,
    IndexedFile,
    SearchModels,
    ServedIndex,
    by_place,
    file_id,
    find,
    passages_of,
)
from bessemer.serving.retrieval.protocol import Wanted
from bessemer.serving.retrieval.uploads import Upload, Uploads, file_of_document
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Client

#: The name of an index, as clients say it.
_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


class Store(Protocol):
    """A vector store as routes use it. groups: the caller's."""

    id: str
    name: str
    created: int
    metadata: Mapping[str, str]
    #: Whether it is one of the server's indexes, which clients only read.
    is_served: bool

    def files(self, groups: frozenset[str]) -> list[StoreFile]:
        """The files that a caller may see."""

    def search(self, query: str, wanted: Wanted, groups: frozenset[str]) -> list[ServedHit]:
        """Passages that a caller may see. Call it off the event loop. Raises RequestError as `search`, and ApiError."""

    def passages(self, file: str, groups: frozenset[str]) -> list[Passage]:
        """All passages of a file, in order; none for one that the caller may not see."""

    def path(self, file: str, groups: frozenset[str]) -> Path | None:
        """Where a file lies that the caller may see; None where it does not lie here. Call it off the event loop."""


class IndexStore:
    """An index of the server's own. Each of its documents is a file."""

    is_served = True

    def __init__(self, id: str, folder: Path, models: SearchModels = NO_MODELS) -> None:
        """Raises ArtefactError as `open_index`."""
        self.id = self.name = id
        self.index = ServedIndex(id, folder, models=models)
        self._folder = folder
        self.created = int((folder / INDEX).stat().st_mtime)
        self.metadata: Mapping[str, str] = {}

    def files(self, groups: frozenset[str]) -> list[StoreFile]:
        return [StoreFile(file_id(one.place), one.place, one.size, self.created) for one in self._visible(groups)]

    def search(self, query: str, wanted: Wanted, groups: frozenset[str]) -> list[ServedHit]:
        if wanted.filters is not None:
            raise ApiError(f"filters: documents of '{self.id}' have no attributes", parameter="filters", code="invalid_value")
        return find(self.index.current(), self.id, query, wanted, Filter(groups=groups), by_place)

    def passages(self, file: str, groups: frozenset[str]) -> list[Passage]:
        return passages_of(self.index.current(), [one for one in self._visible(groups) if file_id(one.place) == file])

    def path(self, file: str, groups: frozenset[str]) -> Path | None:
        place = next((one.place for one in self._visible(groups) if file_id(one.place) == file), None)
        return None if place is None else file_of_document(self._folder, place)

    def _visible(self, groups: frozenset[str]) -> list[IndexedFile]:
        return [one for one in self.index.files().values() if one.is_visible(groups)]


class VectorStores:
    """All stores of a server. Call it on the event loop, but for `search`."""

    def __init__(
        self,
        indexes: Mapping[str, Path],
        folder: Path | None = None,
        *,
        takes_files: bool = True,
        models: SearchModels = NO_MODELS,
    ) -> None:
        """indexes: the server's own, by name. folder: for clients' files and stores; None: a temporary one. takes_files:
        whether clients may upload files. models: of searches of all stores. Raises ArtefactError as
        `open_index`."""
        self.served = {name: IndexStore(name, place, models) for name, place in indexes.items()}
        self._models = models
        self.takes_files = takes_files
        self._temporary: TemporaryDirectory[str] | None = None
        self._folder = folder
        self._opened: tuple[Uploads, dict[str, ClientStore]] | None = None
        self._chosen: StoreEmbedder | None = None
        self._choosing = Lock()

    @property
    def uploads(self) -> Uploads:
        """Clients' files. Raises ApiError (403) where none are taken."""
        return self._clients()[0]

    def of(self, client: Client) -> list[Store]:
        """The stores that a client may search."""
        own = [store for store in self._client_stores.values() if store.owner == client.id]
        return [*self.served.values(), *own]

    def find(self, id: str, client: Client) -> Store:
        """A store. Raises ApiError (404) for one that is unknown, or another client's."""
        store: Store | None = self.served.get(id) or self._client_stores.get(id)
        if store is None or (isinstance(store, ClientStore) and store.owner != client.id):
            raise ApiError(f"there is no vector store '{id}'", status=404, parameter="vector_store_ids", code="store_not_found")
        return store

    def find_own(self, id: str, client: Client) -> ClientStore:
        """A store that a client may change. Raises ApiError: 404 as `find`, 403 for one of the server's indexes."""
        store = self.find(id, client)
        if not isinstance(store, ClientStore):
            raise ApiError(f"'{id}' is an index of the server's own, which clients only read", status=403, code="not_allowed")
        return store

    def create(self, client: Client, name: str, metadata: Mapping[str, str]) -> ClientStore:
        """A new store. Raises ApiError (400) beyond the limit of a key."""
        uploads, stores = self._clients()
        if sum(store.owner == client.id for store in stores.values()) >= STORES.most:
            raise ApiError(f"{STORES.most:,} vector stores are kept for a key; delete some")
        id = f"vs_{uuid.uuid4().hex}"
        record: dict[str, Any] = {"id": id, "owner": client.id, "name": name, "created": int(time.time()), "metadata": metadata}
        place = self._root() / "stores" / id
        place.mkdir(parents=True)
        record |= {"index": 0, "holds_deleted": False, "files": {}}
        stores[id] = ClientStore(place, uploads, self._embedder, record, self._models)
        stores[id].save()
        return stores[id]

    async def delete(self, store: ClientStore) -> None:
        """Delete a store with its index, for good; its files stay."""
        del self._clients()[1][store.id]
        if store.task is not None:
            await store.task
        await asyncio.to_thread(shutil.rmtree, self._root() / "stores" / store.id, ignore_errors=True)

    def delete_upload(self, upload: Upload) -> None:
        """Delete a file, also from the stores that hold it."""
        uploads, stores = self._clients()
        for store in stores.values():
            if any(file.id == upload.id for file in store.files()):
                store.remove(upload.id)
        uploads.remove(upload)

    def chosen(self, wanted: Wanted, client: Client) -> list[Store]:
        """The stores that a request names, or the server's own indexes. Raises ApiError: 404 for an unknown one, 400 where none
        is named and the server has none."""
        if wanted.stores is not None:
            return [self.find(id, client) for id in dict.fromkeys(wanted.stores)]
        if not self.served:
            raise ApiError(
                "this server has no index; name vector_store_ids, or start it with --index",
                parameter="vector_store_ids",
                code="missing_required_parameter",
            )
        return list(self.served.values())

    def search(self, stores: Sequence[Store], query: str, wanted: Wanted, client: Client) -> list[ServedHit]:
        """The best passages of stores that a client may see, fused by rank, near copies once. Call it off the event loop.
        Raises RequestError for a query that is empty or too long."""
        if not query.strip():
            raise RequestError("retrieval: the query is empty")
        if len(query) > MOST_CHARACTERS:
            raise RequestError(
                f"retrieval: the query has {len(query):,} characters, at most {MOST_CHARACTERS:,} are searched for"
            )
        groups = client.principal.groups
        hits = [hit for store in stores for hit in store.search(query, wanted, groups)]
        if len(stores) > 1:
            hits = sorted(hits, key=lambda hit: (-hit.score, -hit.relevance))
        kept = without_copies(hits, wanted.count)
        return [hit for hit in kept if isinstance(hit, ServedHit)]

    def embedder(self) -> Embedder | None:
        """What clients' stores are embedded with; None where they are searched by words only. It may load a model: call it off
        the event loop."""
        return self._embedder().embedder

    def embedder_name(self) -> str | None:
        """By what name clients may ask for it; of a folder or a URL, the last part. Call it off the event loop."""
        name = self._embedder_setting()
        return None if name == "none" else Path(name.rpartition("#")[2]).name

    async def close(self) -> None:
        """Wait for what is being indexed, and remove a temporary folder."""
        if self._opened is not None:
            for store in self._opened[1].values():
                if store.task is not None:
                    await store.task
        if self._temporary is not None:
            await asyncio.to_thread(self._temporary.cleanup)

    def _embedder(self) -> StoreEmbedder:
        with self._choosing:
            if self._chosen is None:
                name = self._embedder_setting()
                opened = self._indexes()[:1]
                embedder = opened[0].embedder if opened else None if name == "none" else open_embedder(name)
                self._chosen = StoreEmbedder(name, embedder)
            return self._chosen

    def _embedder_setting(self) -> str:
        """That of the server's first index; without one all-MiniLM-L6-v2 where it is installed, else none."""
        indexes = self._indexes()
        if indexes:
            return indexes[0].config.embedder
        return "none" if packaged_minilm() is None else "minilm"

    def _indexes(self) -> list[OpenIndex]:
        return [store.index.current() for store in self.served.values()]

    @property
    def _client_stores(self) -> Mapping[str, ClientStore]:
        """Those of clients; none before a first one, or a folder of an earlier server."""
        is_empty = self._opened is None and self._folder is None
        return {} if is_empty or not self.takes_files else self._clients()[1]

    def _clients(self) -> tuple[Uploads, dict[str, ClientStore]]:
        if not self.takes_files:
            raise ApiError("this server keeps no files of its clients", status=403, code="not_allowed")
        if self._opened is None:
            root = self._root()
            uploads = Uploads(root / "files")
            paths = sorted((root / "stores").glob(f"*/{RECORD}"))
            records = [(path.parent, read_record(path)) for path in paths]
            stores = [ClientStore(place, uploads, self._embedder, record, self._models) for place, record in records]
            self._opened = uploads, {store.id: store for store in sorted(stores, key=lambda store: store.created)}
        return self._opened

    def _root(self) -> Path:
        if self._folder is None:
            self._temporary = TemporaryDirectory(prefix="bessemer-files-")
            self._folder = Path(self._temporary.name)
        return self._folder


def index_folders(given: Sequence[str]) -> dict[str, Path]:
    """Folders of indexes by the names that clients use: FOLDER, or NAME=FOLDER; of an address on object storage a copy of what
    is there now. Raises ConfigError for two of one name and for one that is no name, ArtefactError where no index is."""
    folders: dict[str, Path] = {}
    for each in given:
        name, is_named, folder = each.partition("=")
        given_place = folder if is_named else each
        place = Path(given_place)
        name = name if is_named else place.resolve().name.removesuffix(".index")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--index {each}: {name!r} is no name: use letters, digits, points, dashes; NAME={place}")
        place = local_index(given_place)
        if not (place / INDEX).is_file():
            raise ArtefactError(f"{place}: no index of documents is here; bessemer index DOCS {place} makes one")
        if name in folders:
            raise ConfigError(f"--index {each}: another index is called {name!r}; name it: NAME={place}")
        folders[name] = place
    return folders


async def sources_for(question: str, wanted: Wanted, stores: VectorStores, client: Client, parameter: str) -> list[ServedHit]:
    """Passages for a chat, found before its turn begins.

    The server searches itself, for the user's last message: whether a small model would call a search, and for what, is not
    left to it. parameter: that has the question. Raises ApiError: 404 for an unknown vector store, 400 for a question that is
    empty or too long.
    """
    searched = stores.chosen(wanted, client)
    try:
        return await asyncio.to_thread(stores.search, searched, question, wanted, client)
    except RequestError as error:
        raise ApiError(str(error), parameter=parameter, code="invalid_value") from None
