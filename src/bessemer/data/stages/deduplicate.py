"""Stage `deduplicate`: of documents that are the same the best one stays, whatever order they came in: by licence, by quality
where the settings name scores, then by the smallest id.

Each method looks at what the ones before it left, and finds documents to drop or passages to cut; at the end one reading
applies all that was found, part by part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.object_storage import Place, fingerprint_of
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.config import DeduplicateConfig
from bessemer.data.corpus.reader import document_files, document_schema, iterate_documents
from bessemer.data.corpus.remote import SCRATCH, documents_at_hand, working_place
from bessemer.data.deduplication.chain import after, apply
from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.embeddings import embedding_files, read_embeddings
from bessemer.data.deduplication.exact import exact_duplicates, url_duplicates
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.deduplication.passages import repeated_lines, repeated_paragraphs, repeated_sentences
from bessemer.data.deduplication.preference import Preference
from bessemer.data.deduplication.removals import DuplicateRemovals, Removals, SpanRemovals
from bessemer.data.deduplication.semantic import semantic_duplicates
from bessemer.data.deduplication.substrings import repeated_substrings
from bessemer.data.deduplication.summary import summarise
from bessemer.data.reports.dataset_card import StageRecord, lineage, write_card
from bessemer.data.stages.mixing import mixtures_of, mixtures_told
from bessemer.data.stages.mixture import mixed
from bessemer.data.stages.transform import Change, transform, with_reasons


def deduplicate(
    config: DeduplicateConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents without copies and a dataset card of them, `README.md`, and return the stage's metrics; `duplicates`
    in them tells of each method.

    Methods compare all documents with all, on the machine that runs the stage: what lies on object storage is copied into
    its scratch folder first. What they found is applied where the parts are written.
    Raises ConfigError when the earlier corpus that `against` names is none.
    """
    progress = progress or Silent()
    scratch = out / SCRATCH / "methods"
    corpus = corpus_of(config, documents_at_hand(documents, out / SCRATCH / "documents"), folder)
    findings, told = [], {}
    for method in config.methods:
        place = scratch / method
        place.mkdir(parents=True, exist_ok=True)
        with progress.task(f"looking for duplicates: {method}", total=len(corpus), unit="documents") as task:
            finding, told[method] = METHODS[method](config, corpus, place, folder)
            task.advance(len(corpus))
        findings.append(finding)
        if method != config.methods[-1]:
            corpus = after(corpus, finding)
    mixtures, sizes = mixtures_of(config, documents, partial(_applying, findings))
    schema = document_schema(documents)
    for column in mixtures:
        schema = schema.append(pa.field(column, pa.int64()))
    metrics = transform(
        documents,
        out,
        schema,
        partial(_applying, _sent(findings, working_place(config.storage, out) / SCRATCH), mixtures),
        "writing without duplicates",
        engine=config.where(),
        storage=config.storage,
        progress=progress,
    )
    metrics |= {"duplicates": told}
    if mixtures:
        metrics["mixtures"] = mixtures_told(config, mixtures, sizes, out)
    write_card(out, [*lineage(documents), StageRecord("deduplicate", config.output_settings(), metrics)])
    return metrics


def corpus_of(config: DeduplicateConfig, documents: Path, folder: Path) -> Corpus:
    """The documents, and the earlier corpus that they are compared with."""
    earlier = None if config.against is None else partial(iterate_documents, _earlier(config.against, folder))
    preference = Preference(config.keep.licenses, config.keep.quality)
    preference.check(document_schema(documents))
    return Corpus.of(partial(iterate_documents, documents), earlier, preference)


def outside_of(config: DeduplicateConfig, folder: Path) -> Any:
    """What the settings name outside of themselves: the earlier corpus and embeddings, by their hashes; a function by name."""
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
    document_files(place)  # says what is wrong with it, if something is
    return place


def _sent(findings: list[Removals], place: Place) -> list[Removals]:
    """What was found, as those who write the parts can read it: pieces to cut lie in a file, which goes to object storage."""
    if isinstance(place, Path):
        return findings
    sent: list[Removals] = []
    for finding in findings:
        if isinstance(finding, SpanRemovals):
            assert isinstance(finding.bounds, Path), "a method leaves it in its scratch folder"
            bounds = place / finding.bounds.name
            bounds.upload(finding.bounds)
            finding = dataclasses.replace(finding, bounds=bounds.listed())
        sent.append(finding)
    return sent


def _applying(findings: list[Removals], mixtures: Mapping[str, Mapping[str, float]] | None = None) -> Change:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows, reasons = apply(findings, batch)
        if mixtures:
            rows, found = mixed(rows, mixtures)
            reasons = pc.coalesce(reasons, found)
        return with_reasons(rows, reasons)

    return change


#: From the settings, the corpus, a folder for scratch and the recipe's folder to what a method finds, and what is told of it.
Method = Callable[[DeduplicateConfig, Corpus, Path, Path], tuple[Removals, dict[str, Any]]]


def _exact(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    return _dropped(corpus, exact_duplicates(corpus))


def _url(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    return _dropped(corpus, url_duplicates(corpus))


def _minhash(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    found = near_duplicates(corpus, scratch, **config.minhash.model_dump())
    verdicts, figures = _dropped(corpus, found.verdicts)
    return verdicts, figures | {"candidates": found.candidates, "compared": found.compared, "confirmed": found.confirmed}


def _lines(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    settings = config.passages
    return _cut(repeated_lines(corpus, scratch, least_words=settings.least_words, least_words_left=settings.least_words_left))


def _paragraphs(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    settings = config.passages
    return _cut(
        repeated_paragraphs(corpus, scratch, least_words=settings.least_words, least_words_left=settings.least_words_left)
    )


def _sentences(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    settings = config.passages
    return _cut(
        repeated_sentences(
            corpus,
            scratch,
            span=settings.sentences,
            least_words=settings.least_words,
            least_words_left=settings.least_words_left,
        )
    )


def _substrings(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    settings = config.passages
    return _cut(
        repeated_substrings(corpus, scratch, length=settings.substring_words, least_words_left=settings.least_words_left)
    )


def _semantic(config: DeduplicateConfig, corpus: Corpus, scratch: Path, folder: Path) -> tuple[Removals, dict[str, Any]]:
    settings = config.semantic
    embed, embeddings = None, None
    if settings.embeddings is not None and is_user_function(settings.embeddings):
        embed = partial(_embedded, load_user_function(settings.embeddings, folder), settings.embeddings)
    elif settings.embeddings is not None:
        embeddings = read_embeddings(follow((folder / settings.embeddings).resolve()))
    verdicts = semantic_duplicates(
        corpus, scratch, embed, embeddings=embeddings, threshold=settings.threshold, clusters=settings.clusters
    )
    return _dropped(corpus, verdicts)


def _embedded(function: Callable[[pa.Array], Any], name: str, texts: pa.Array) -> np.ndarray:
    try:
        found = np.asarray(function(texts), dtype=np.float64)
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    if found.ndim != 2 or len(found) != len(texts):
        raise ConfigError(f"{name}: it returned an array of shape {found.shape} for {len(texts)} texts; a row each is needed")
    return found


METHODS: dict[str, Method] = {
    "exact": _exact,
    "url": _url,
    "minhash": _minhash,
    "lines": _lines,
    "paragraphs": _paragraphs,
    "sentences": _sentences,
    "substrings": _substrings,
    "semantic": _semantic,
}


def _dropped(corpus: Corpus, verdicts: DuplicateRemovals) -> tuple[DuplicateRemovals, dict[str, Any]]:
    return verdicts, summarise(corpus, verdicts)


def _cut(cuts: SpanRemovals) -> tuple[SpanRemovals, dict[str, Any]]:
    return cuts, {"passages": cuts.pieces, "documents_cut": len(cuts.ids)}
