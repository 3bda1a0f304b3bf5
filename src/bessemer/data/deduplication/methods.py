"""The deduplication methods of a recipe: from the corpus and their settings to removals and their summary.

Each takes the corpus, a scratch folder, its settings and the folder that paths in them are relative to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from bessemer.core.errors import ConfigError
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.deduplication.config import MinHashConfig, PassagesConfig, SemanticConfig
from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.embeddings import read_embeddings
from bessemer.data.deduplication.exact import exact_duplicates, url_duplicates
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.deduplication.passages import repeated_lines, repeated_paragraphs, repeated_sentences
from bessemer.data.deduplication.removals import DuplicateRemovals, Removals, SpanRemovals
from bessemer.data.deduplication.semantic import semantic_duplicates
from bessemer.data.deduplication.substrings import repeated_substrings
from bessemer.data.deduplication.summary import summarise
from bessemer.data.sources.http.fetch import Clock, tried_again

#: Attempts after the first to get a user's embeddings, where waiting may help.
_RETRIES = 3

Result: TypeAlias = tuple[Removals, dict[str, Any]]


def exact(corpus: Corpus, scratch: Path, settings: None, folder: Path) -> Result:
    """Documents with the text hash of another."""
    return _with_clusters(corpus, exact_duplicates(corpus))


def url(corpus: Corpus, scratch: Path, settings: None, folder: Path) -> Result:
    """Documents with the address of another."""
    return _with_clusters(corpus, url_duplicates(corpus))


def minhash(corpus: Corpus, scratch: Path, settings: MinHashConfig, folder: Path) -> Result:
    """Near duplicates by MinHash; the summary also counts candidates, comparisons and confirmed pairs."""
    near = near_duplicates(corpus, scratch, **settings.model_dump())
    removals, summary = _with_clusters(corpus, near.duplicates)
    return removals, summary | {"candidates": near.candidates, "compared": near.compared, "confirmed": near.confirmed}


def lines(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Lines that stand in an earlier document."""
    return _with_counts(
        repeated_lines(corpus, scratch, least_words=settings.least_words, least_words_left=settings.least_words_left)
    )


def paragraphs(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Paragraphs that stand in an earlier document."""
    return _with_counts(
        repeated_paragraphs(corpus, scratch, least_words=settings.least_words, least_words_left=settings.least_words_left)
    )


def sentences(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Runs of sentences that stand in an earlier document."""
    return _with_counts(
        repeated_sentences(
            corpus,
            scratch,
            span=settings.sentences,
            least_words=settings.least_words,
            least_words_left=settings.least_words_left,
        )
    )


def substrings(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Long runs of words that stand at an earlier place."""
    return _with_counts(
        repeated_substrings(corpus, scratch, length=settings.substring_words, least_words_left=settings.least_words_left)
    )


def semantic(corpus: Corpus, scratch: Path, settings: SemanticConfig, folder: Path) -> Result:
    """Documents whose embeddings are alike: those of a file, of a user's function, or hashed TF-IDF."""
    embed, embeddings = None, None
    if settings.embeddings is not None and is_user_function(settings.embeddings):
        embed = partial(_embedded, load_user_function(settings.embeddings, folder), settings.embeddings)
    elif settings.embeddings is not None:
        embeddings = read_embeddings(follow((folder / settings.embeddings).resolve()))
    duplicates = semantic_duplicates(
        corpus, scratch, embed, embeddings=embeddings, threshold=settings.threshold, clusters=settings.clusters
    )
    return _with_clusters(corpus, duplicates)


def _embedded(function: Callable[[pa.Array], Any], name: str, texts: pa.Array, clock: Clock | None = None) -> np.ndarray:
    """A user's embeddings. Raises ConfigError where it fails for a reason that does not pass: a document without an embedding
    cannot be compared, and copies of it would stay.
    """
    try:
        embeddings = np.asarray(tried_again(partial(function, texts), _RETRIES, clock or Clock()), dtype=np.float64)
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ConfigError(
            f"{name}: it returned an array of shape {embeddings.shape} for {len(texts)} texts; a row each is needed"
        )
    return embeddings


def _with_clusters(corpus: Corpus, duplicates: DuplicateRemovals) -> Result:
    return duplicates, summarise(corpus, duplicates)


def _with_counts(spans: SpanRemovals) -> Result:
    return spans, {"passages": spans.spans, "documents_cut": len(spans.ids)}
