"""An index that a server reads while it may be updated, and what a caller may see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.retrieval.embed import Embedder
from bessemer.retrieval.expansion import Expander
from bessemer.retrieval.index import INDEX, OpenIndex, open_index
from bessemer.retrieval.rerank import Reranker
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.store import Filter, LanceStore, Passage
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.retrieval.protocol import Wanted
from bessemer.serving.runtime.bodies import ApiError

#: How slowly relevance falls with the rank where there is no cosine: as in reciprocal-rank fusion (Cormack et al. 2009).
_RANK_CONSTANT = 60


@dataclass(frozen=True)
class IndexedFile:
    """A document of an index. groups: who may see it; empty: everybody. passages: their number. size: bytes of its text up to
    the end of the last passage."""

    place: str
    title: str
    groups: frozenset[str]
    passages: int
    size: int

    def is_visible(self, groups: frozenset[str] | None) -> bool:
        """Whether a principal of these groups may see it; None: of all."""
        return groups is None or not self.groups or not self.groups.isdisjoint(groups)


@dataclass(frozen=True)
class SearchModels:
    """Models that searches ask beside the embedder (`OpenIndex`)."""

    reranker: Reranker | None = None
    expander: Expander | None = None


#: Searches without further models.
NO_MODELS = SearchModels()


class ServedIndex:
    """An index in its current version, which is opened when the folder has a newer one."""

    def __init__(self, name: str, folder: Path, embedder: Embedder | None = None, models: SearchModels = NO_MODELS) -> None:
        """Raises ArtefactError as `open_index`."""
        self._name = name
        self._folder = folder
        self._lock = Lock()
        self._models = models
        self._open = open_index(folder, embedder, models.reranker, models.expander)
        self._state = self._state_now()
        self._files: Mapping[str, IndexedFile] | None = None

    def current(self) -> OpenIndex:
        """The index. Raises ApiError (503) where its newest version cannot be read."""
        with self._lock:
            state = self._state_now()
            if state != self._state:
                self._open, self._state, self._files = self._reopened(), state, None
            return self._open

    def files(self) -> Mapping[str, IndexedFile]:
        """All documents by their places, also those that a caller may not see. Raises as `current`."""
        index = self.current()
        with self._lock:
            if self._files is None or self._open is not index:
                files = _files_of(index.store)
                if self._open is not index:
                    return files
                self._files = files
            return self._files

    def _reopened(self) -> OpenIndex:
        models = self._models.reranker, self._models.expander
        try:
            try:
                return open_index(self._folder, self._open.embedder, *models)
            except ArtefactError:
                # the index may have been made anew with another embedder
                return open_index(self._folder, None, *models)
        except ArtefactError as error:
            reason = str(error).replace(str(self._folder), self._name)
            raise ApiError(reason, status=503, kind="server_error", headers={"Retry-After": "30"}) from None

    def _state_now(self) -> tuple[int, int] | None:
        try:
            status = (self._folder / INDEX).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino


def _files_of(store: LanceStore) -> dict[str, IndexedFile]:
    files: dict[str, IndexedFile] = {}
    for batch in store.batches(["document", "title", "groups", "end"]):
        columns = [batch[name].to_pylist() for name in ("document", "title", "groups", "end")]
        for place, title, groups, end in zip(*columns, strict=True):
            known = files.get(place)
            passages, size = (known.passages, known.size) if known else (0, 0)
            files[place] = IndexedFile(place, title, frozenset(groups or ()), passages + 1, max(size, end))
    return files


def file_id(place: str) -> str:
    """The id by which clients know a document of a served index."""
    return f"file-{hash_value(place)[:24]}"


#: Gives id and name of the file that a passage is from.
Naming = Callable[[Passage], tuple[str, str]]


def by_place(passage: Passage) -> tuple[str, str]:
    """A document as a file of its own."""
    return file_id(passage.document), passage.document


def find(index: OpenIndex, store: str, query: str, wanted: Wanted, where: Filter, naming: Naming) -> list[ServedHit]:
    """The passages of an index that a request wants, the best first. Raises RequestError as `search`."""
    has_vectors = index.embedder is not None
    if wanted.threshold and not has_vectors:
        raise ApiError(
            f"score_threshold: '{store}' is searched by words only, and their scores have no scale",
            parameter="score_threshold",
            code="invalid_value",
        )
    hits = search(index, query, wanted.count, mode=wanted.mode, where=where, section=wanted.section)
    served = [_served(hit, store, naming, has_vectors=has_vectors) for hit in hits]
    return [hit for hit in served if hit.relevance >= wanted.threshold]


def _served(hit: Hit, store: str, naming: Naming, *, has_vectors: bool) -> ServedHit:
    if has_vectors:
        relevance = min(1.0, max(0.0, hit.scores.get("meaning", 0.0)))
    else:
        relevance = (_RANK_CONSTANT + 1) / (_RANK_CONSTANT + hit.ranks["words"])
    file, filename = naming(hit.passage)
    return ServedHit(hit.passage, hit.score, hit.ranks, hit.scores, store, file, filename, relevance, found=hit.found)


def passages_of(index: OpenIndex, files: Sequence[IndexedFile]) -> list[Passage]:
    """All passages of documents, in order."""
    return [passage for file in files for passage in index.store.of_document(file.place, range(file.passages))]


def without_overlaps(passages: Sequence[Passage]) -> list[str]:
    """The texts of a document's passages, each without what the one before holds too."""
    texts: list[str] = []
    document, end = "", 0
    for passage in passages:
        if passage.document != document:
            document, end = passage.document, 0
        raw = passage.text.encode()
        texts.append(raw[max(0, min(len(raw), end - passage.start)) :].decode(errors="ignore"))
        end = max(end, passage.end)
    return texts
