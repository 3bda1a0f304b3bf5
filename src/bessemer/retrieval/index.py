"""An index of documents in a folder: built, updated and opened.

`index.json` names the version that is read, and how its vectors were made. An update builds the next version beside it:
unchanged documents are copied with their vectors, new ones are cut and embedded, and missing ones are left out. When the new
version is complete and checked, `index.json` is replaced in one step. So a crash at any moment leaves the old version, and the
next run continues with the documents that are embedded already. The previous version stays, since a reader may have it open.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import check_format, locked_folder, read_json, write_json
from bessemer.retrieval.chunks import Region, cut_document, place_of
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.embed import Embedder, open_embedder
from bessemer.retrieval.expansion import Expander, Headings
from bessemer.retrieval.rerank import Reranker
from bessemer.retrieval.store import HEADINGS_BETWEEN, LanceStore, Passage, StoreWriter
from bessemer.retrieval.terms import words_of_text

INDEX = "index.json"
_FORMAT = 1
VERSIONS = "versions"
#: Seconds to wait for another process that writes.
PATIENCE = 3600.0
#: Folder beside the index for what sources download, and the file of who may see which documents.
CACHE, ACCESS = "cache", "access.json"


@dataclass(frozen=True)
class IndexedDocument:
    """A document to index. place: names it, and stays. groups: who may see it, by their names; empty: everybody. regions: on
    which pages of its file the text stands, where that is known."""

    place: str
    text: str
    title: str = ""
    source: str = ""
    url: str = ""
    groups: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()

    @cached_property
    def content(self) -> str:
        """Hash of everything that the index stores of the document."""
        places = [self.regions] if self.regions else []
        return hash_value([self.text, self.title, self.source, self.url, list(self.groups), *places])


@dataclass(frozen=True)
class IndexSummary:
    """Result of a build or an update: numbers of documents by what happened to them, and of passages."""

    documents: int
    passages: int
    added: int
    changed: int
    deleted: int
    empty: int

    def __str__(self) -> str:
        changes = [f"{count:,} {name}" for name in ("added", "changed", "deleted") if (count := getattr(self, name))]
        left_out = f"; {self.empty:,} without text left out" if self.empty else ""
        return f"{self.documents:,} documents, {self.passages:,} passages ({', '.join(changes) or 'unchanged'}{left_out})"


@dataclass(frozen=True)
class OpenIndex:
    """An index that is read. reranker: orders what its searches find; None: they are ordered by the searches alone. expander:
    writes headings that are searched for besides; None: the query's own words and meaning are all."""

    folder: Path
    config: IndexConfig
    store: LanceStore
    embedder: Embedder | None
    reranker: Reranker | None = None
    expander: Expander | None = None

    @cached_property
    def headings(self) -> Headings:
        """The headings of its passages."""
        return Headings(self.store)


def open_index(
    folder: Path,
    embedder: Embedder | None = None,
    reranker: Reranker | None = None,
    expander: Expander | None = None,
) -> OpenIndex:
    """Open the complete version of an index. embedder: used in place of the one that the index names. reranker, expander: of
    searches of this index (`OpenIndex`).

    Raises ArtefactError where there is no index, or its vectors were made by another embedder.
    """
    values = _read(folder)
    config = IndexConfig.parse(values["config"], str(folder / INDEX))
    store = LanceStore(folder / VERSIONS / str(values["version"]))
    # a damaged one is said now, not at the first search
    _ = store.words
    if config.embedder != "none":
        embedder = embedder or open_embedder(config.embedder)
        if embedder.identity != values["embedder"]:
            raise ArtefactError(
                f"{folder}: its vectors were made by {values['embedder']}, and {config.embedder} is {embedder.identity} now; "
                "vectors of two models do not compare: index the documents again, into this folder"
            )
    return OpenIndex(folder, config, store, embedder if config.embedder != "none" else None, reranker, expander)


def build_index(
    documents: Iterable[IndexedDocument],
    out: Path,
    config: IndexConfig | None = None,
    *,
    embedder: Embedder | None = None,
    progress: Progress | None = None,
) -> IndexSummary:
    """Make an index of documents in a folder, or bring the one that is there up to date.

    config: None: that of the existing index, or the defaults. Documents that are not among `documents` leave the index. After a
    change of settings or embedder all documents are cut and embedded again. Where another process writes to the folder, it is
    waited for. Raises ArtefactError for a folder that holds something else, or that another process writes to for long;
    ConfigError where there is nothing to index.
    """
    out.mkdir(parents=True, exist_ok=True)
    shown = progress or Silent()
    with _locked(out, shown):
        return _Build(out, config, embedder, shown).run(documents)


@contextmanager
def _locked(out: Path, progress: Progress) -> Iterator[None]:
    """Lock an index against other writers, when they have ended."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(out))
        except ArtefactError:
            progress.say(f"  {out}: another process is at work in this folder; waiting for its end")
            stack.enter_context(locked_folder(out, PATIENCE))
        yield


class _Build:
    def __init__(self, out: Path, config: IndexConfig | None, embedder: Embedder | None, progress: Progress) -> None:
        self._out = out
        for place in (out, out / VERSIONS):
            # left by a process that was killed while it wrote a file
            for path in place.glob(".*.tmp"):
                path.unlink()
        self._before = _read(out) if (out / INDEX).exists() else None
        if self._before is None and any(path.name not in (VERSIONS, CACHE, ACCESS) for path in out.iterdir()):
            raise ArtefactError(f"{out}: there are files here that are no index; name another folder")
        own = IndexConfig() if self._before is None else IndexConfig.parse(self._before["config"], str(out / INDEX))
        self._config = config or own
        self._embedder = None
        if self._config.embedder != "none":
            self._embedder = embedder or open_embedder(self._config.embedder)
        self._progress = progress
        self._made = {
            "config": self._config.model_dump(mode="json"),
            "embedder": None if self._embedder is None else self._embedder.identity,
        }

    def run(self, documents: Iterable[IndexedDocument]) -> IndexSummary:
        version = 1 if self._before is None else int(self._before["version"]) + 1
        old = self._reusable()
        known = {} if old is None else _documents(old.batches(["document", "content"]))
        place = self._begin(version)
        writer = StoreWriter(place, None if self._embedder is None else self._embedder.width)
        written = _documents(writer.batches(["document", "content"]))
        states: dict[str, str] = {}
        counts: Counter[str] = Counter()
        expected: dict[str, int] = {}
        kept: set[str] = set()
        waiting: list[IndexedDocument] = []
        characters = 0

        def write() -> None:
            for written_document, passages in self._write(writer, waiting).items():
                if passages:
                    expected[written_document] = passages
                else:
                    counts["changed" if written_document in known else "added"] -= 1
                    counts["empty"] += 1
            waiting.clear()

        for document in documents:
            if document.place in states:
                raise ConfigError(f"two documents are called {document.place!r}; each needs a place of its own")
            content = document.content if document.text.strip() else ""
            states[document.place] = content
            if not content:
                counts["empty"] += 1
            elif known.get(document.place, _ABSENT).content == content:
                kept.add(document.place)
            else:
                counts["changed" if document.place in known else "added"] += 1
                if written.get(document.place, _ABSENT).content == content:
                    expected[document.place] = written[document.place].passages
                else:
                    waiting.append(document)
                    characters += len(document.text)
            if characters > _CHARACTERS_AT_ONCE:
                write()
                characters = 0
        write()
        # an interrupted build may have copied a document in part, and documents that it embedded may have changed since
        writer.remove([name for name in written if name in kept or states.get(name) != written[name].content])
        if old is not None:
            writer.copy(_rows_of(old, kept, writer.names))
            expected |= {name: known[name].passages for name in kept}
        if not expected:
            raise ConfigError("there is no document with text to index")
        deleted = len(known.keys() - expected.keys())
        if old is not None and old.has_words and not (counts["added"] or counts["changed"] or deleted):
            shutil.rmtree(place)
            _marker(place).unlink()
        else:
            writer.finish(expected)
            self._swap(version, len(expected), sum(expected.values()))
        return IndexSummary(len(expected), sum(expected.values()), counts["added"], counts["changed"], deleted, counts["empty"])

    def _reusable(self) -> LanceStore | None:
        """The current version, if its passages were cut and embedded in the same way; else None."""
        if self._before is None or any(self._before[name] != value for name, value in self._made.items()):
            return None
        return LanceStore(self._out / VERSIONS / str(self._before["version"]))

    def _begin(self, version: int) -> Path:
        """The folder of the next version. A version that an interrupted build began there is continued if it was made in the
        same way."""
        place = self._out / VERSIONS / str(version)
        marked = _marker(place)
        if place.exists() and (not marked.exists() or read_json(marked) != self._made):
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        write_json(marked, self._made)
        return place

    def _write(self, writer: StoreWriter, documents: Sequence[IndexedDocument]) -> dict[str, int]:
        """Cut, embed and write documents. Returns the number of passages of each; 0 for one of headings only."""
        passages: list[Passage] = []
        contents: list[str] = []
        for document in documents:
            own = passages_of(document, self._config)
            passages += own
            contents += [document.content] * len(own)
        if passages:
            writer.add(passages, contents, None if self._embedder is None else self._vectors(self._embedder, passages))
            self._progress.say(f"  {len(passages):,} passages of {len(documents):,} documents")
        return {document.place: 0 for document in documents} | Counter(one.document for one in passages)

    def _vectors(self, embedder: Embedder, passages: Sequence[Passage]) -> np.ndarray:
        """The vectors of passages, (N, D)."""
        vectors = []
        with self._progress.task("embed", len(passages), "passages") as task:
            for first in range(0, len(passages), _EMBEDDED_AT_ONCE):
                some = passages[first : first + _EMBEDDED_AT_ONCE]
                vectors.append(embedder.embed([one.shown for one in some], "document"))
                task.advance(len(some))
        return np.concatenate(vectors)

    def _swap(self, version: int, documents: int, passages: int) -> None:
        versions = self._out / VERSIONS
        values = {"format": _FORMAT, "version": version, "documents": documents, "passages": passages, **self._made}
        write_json(self._out / INDEX, values)
        for path in versions.iterdir():
            number = path.name.removesuffix(".json")
            if number.isdecimal() and (int(number) < version - 1 or path.suffix == ".json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _marker(place: Path) -> Path:
    """The file beside a version that says how it is made."""
    return place.with_name(f"{place.name}.json")


#: Characters of documents that are cut and embedded between two writes, and passages that are embedded between two signs of
#: progress.
_CHARACTERS_AT_ONCE, _EMBEDDED_AT_ONCE = 1_000_000, 512


def passages_of(document: IndexedDocument, config: IndexConfig) -> list[Passage]:
    """A document's passages, in order; none of a document that only repeats its title, as the documentation of many a field
    does."""
    if not _says_more(document.text, document.title):
        return []
    chunks = cut_document(document.text, longest=config.passage_characters, overlap=config.overlap_characters)
    places = [place_of(document.regions, chunk.start, chunk.end) for chunk in chunks]
    return [
        Passage(
            id=hash_value([document.place, document.content, number])[:24],
            document=document.place,
            number=number,
            title=document.title,
            headings=HEADINGS_BETWEEN.join(chunk.headings),
            text=chunk.text,
            start=chunk.start,
            end=chunk.end,
            source=document.source,
            url=document.url,
            groups=document.groups,
            table_header=chunk.table_header,
            page=page,
            box=box,
        )
        for number, (chunk, (page, box)) in enumerate(zip(chunks, places, strict=True))
    ]


def _says_more(text: str, title: str) -> bool:
    """Whether a text has a word that its title has not, or no words at all."""
    words = {word.lower() for word in words_of_text(text)}
    return not words or not words <= {word.lower() for word in words_of_text(title)}


class _Stored(NamedTuple):
    """A document in a store: the hash of its content, and its passages."""

    content: str | None
    passages: int


_ABSENT = _Stored(None, 0)


def _documents(batches: Iterable[pa.RecordBatch]) -> dict[str, _Stored]:
    """The documents of a store."""
    known: dict[str, _Stored] = {}
    for batch in batches:
        for document, content in zip(batch["document"].to_pylist(), batch["content"].to_pylist(), strict=True):
            known[document] = _Stored(content, known.get(document, _ABSENT).passages + 1)
    return known


def _rows_of(store: LanceStore, documents: set[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    names = pa.array(sorted(documents), pa.string())
    for batch in store.batches(columns):
        yield batch.filter(pc.is_in(batch["document"], value_set=names))


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise ArtefactError(f"{folder}: no index of documents is here; bessemer index DOCS {folder} makes one")
    values = read_json(path, "index")
    if not isinstance(values, Mapping) or not {"format", "version", "config"} <= values.keys():
        raise ArtefactError(f"{path}: this is no index of documents")
    check_format(values["format"], _FORMAT, path, "index")
    return values
