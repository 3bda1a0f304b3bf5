"""Stage `deduplicate`: of documents that are the same the best one stays, whatever order they came in: by licence, by quality
where the settings name scores, then by the smallest id.

Each method reads what the ones before it left, and finds documents to drop or spans to cut; at the end one reading applies
all removals, part by part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.object_storage import Place, fingerprint_of
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function
from bessemer.data.config import DeduplicateConfig
from bessemer.data.corpus.dataset_card import StageRecord, lineage, write_card
from bessemer.data.corpus.reader import document_files, document_schema, iterate_documents
from bessemer.data.corpus.remote import SCRATCH, documents_at_hand, working_place
from bessemer.data.corpus.stats import with_reasons
from bessemer.data.deduplication.corpus import Corpus, Preference
from bessemer.data.deduplication.registry import KeepConfig, method_plugin
from bessemer.data.deduplication.removals import Removals, SpanRemovals, after, apply
from bessemer.data.deduplication.semantic import embedding_files
from bessemer.data.stages.mixture import mixed, mixture_columns, mixture_stats, training_bytes
from bessemer.data.stages.transform import Change, transform


def deduplicate(
    config: DeduplicateConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents without copies and a dataset card of them, `README.md`, and return the stage's metrics; `duplicates`
    in them is the summary of each method.

    Methods compare all documents with all, on the machine that runs the stage: what lies on object storage is copied into
    its scratch folder first. Their removals are applied where the parts are written.
    Raises ConfigError when the earlier corpus that `against` names is none.
    """
    progress = progress or Silent()
    engine = config.where()
    corpus = corpus_of(config.keep, config.against, documents_at_hand(documents, out / SCRATCH / "documents"), folder)
    removals, summaries = [], {}
    for name in config.methods:
        plugin = method_plugin(name)
        scratch = out / SCRATCH / "methods" / name
        scratch.mkdir(parents=True, exist_ok=True)
        usual = plugin.settings() if plugin.settings else None
        settings = getattr(config, plugin.section) if plugin.section else usual
        with progress.task(f"looking for duplicates: {name}", total=len(corpus), unit="documents") as task:
            removed, summaries[name] = plugin.load()(corpus, scratch, settings, folder)
            task.advance(len(corpus))
        removals.append(removed)
        if name != config.methods[-1]:
            corpus = after(corpus, removed)
    measured = partial(training_bytes, documents, partial(_applying, removals), engine)
    mixtures, sizes = mixture_columns(config.mix, config.anneal, measured)
    schema = document_schema(documents)
    for column in mixtures:
        schema = schema.append(pa.field(column, pa.int64()))
    metrics = transform(
        documents,
        out,
        schema,
        partial(_applying, _sent(removals, working_place(config.storage, out) / SCRATCH), mixtures),
        "writing without duplicates",
        engine=engine,
        storage=config.storage,
        progress=progress,
    )
    metrics |= {"duplicates": summaries}
    if mixtures:
        metrics["mixtures"] = mixture_stats(mixtures, sizes, out / "documents", engine)
    write_card(out, [*lineage(documents), StageRecord("deduplicate", config.output_settings(), metrics)])
    return metrics


def corpus_of(keep: KeepConfig, against: str | None, documents: Path, folder: Path) -> Corpus:
    """The documents, which of several copies stays, and the earlier corpus that they are compared with."""
    earlier = None if against is None else partial(iterate_documents, _earlier(against, folder))
    preference = Preference(keep.licenses, keep.quality)
    preference.check(document_schema(documents))
    return Corpus.of(partial(iterate_documents, documents), earlier, preference)


def outside_files(config: DeduplicateConfig, folder: Path) -> Any:
    """The earlier corpus and the embeddings that the settings name, by their hashes; a function by its name."""
    named: list[Any] = []
    if config.against is not None:
        named += [[path.name, fingerprint_of(path)] for path in document_files(_earlier(config.against, folder))]
    if (embeddings := config.semantic.embeddings) is not None:
        files = [] if is_user_function(embeddings) else embedding_files(follow((folder / embeddings).resolve()))
        named.append(["embeddings", [hash_file(path) for path in files] or embeddings])
    return named or None


def _earlier(against: str, folder: Path) -> Path:
    place = follow((folder / against).resolve())
    place = place / "documents" if (place / "documents").is_dir() else place
    if not place.is_dir():
        raise ConfigError(f"deduplicate.against: there is no folder {place}")
    # raises when it is no folder of documents
    document_files(place)
    return place


def _sent(removals: list[Removals], place: Place) -> list[Removals]:
    """The removals as the workers that write the parts can read them: spans lie in a file, which goes to object storage."""
    if isinstance(place, Path):
        return removals
    sent: list[Removals] = []
    for one in removals:
        if isinstance(one, SpanRemovals):
            assert isinstance(one.bounds, Path), "a method leaves it in its scratch folder"
            bounds = place / one.bounds.name
            bounds.upload(one.bounds)
            one = dataclasses.replace(one, bounds=bounds.listed())
        sent.append(one)
    return sent


def _applying(removals: list[Removals], mixtures: Mapping[str, Mapping[str, float]] | None = None) -> Change:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows, reasons = apply(removals, batch)
        if mixtures:
            rows, unread = mixed(rows, mixtures)
            reasons = pc.coalesce(reasons, unread)
        return with_reasons(rows, reasons)

    return change
