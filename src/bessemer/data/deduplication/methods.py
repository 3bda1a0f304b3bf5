"""The deduplication methods of a recipe: from the corpus and their settings to removals and their summary for the report.

Each method takes the corpus, a scratch folder, its settings and the folder that paths in them are relative to. Exact
duplicates (the same text or address) are found here, the others in modules of their own. A summary has the sizes of clusters,
and examples with their texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.deduplication.corpus import Corpus, first_of_groups, parse_ids, write_ids
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.deduplication.passages import repeated_lines, repeated_paragraphs, repeated_sentences, repeated_substrings
from bessemer.data.deduplication.registry import MinHashConfig, PassagesConfig, SemanticConfig
from bessemer.data.deduplication.removals import DuplicateRemovals, Removals, SpanRemovals
from bessemer.data.deduplication.semantic import read_embeddings, semantic_duplicates
from bessemer.data.sources.io.fetch import Clock, tried_again

_EXAMPLE_CHARACTERS = 600
_MEMBERS = 3


def summarise(corpus: Corpus, duplicates: DuplicateRemovals, *, examples: int = 5) -> dict[str, Any]:
    """Counts of clusters (a survivor and all that it replaced) by size, and the largest clusters with texts.

    `clusters`, `documents` (dropped), `by_size`: rows of `from`, `to` (a size doubles from row to row), `clusters` and
    `documents`; `largest`: clusters by falling size, then by the survivor's id, each with `id`, `size`, `text` and some
    `members`, of which `id`, `text`, and `similarity` where it is known; the least similar are shown.
    """
    survivors, clusters, dropped = np.unique(duplicates.survivors, axis=0, return_inverse=True, return_counts=True)
    clusters = clusters.reshape(-1)
    sizes = dropped + 1
    largest = np.argsort(-sizes, kind="stable")[:examples]
    shown = [_least_similar(duplicates, np.flatnonzero(clusters == cluster)) for cluster in largest]
    names = write_ids(survivors[largest])
    members = [write_ids(duplicates.dropped[rows]) for rows in shown]
    texts = _texts(corpus, [*names, *(name for row in members for name in row)])
    return {
        "clusters": len(survivors),
        "documents": len(duplicates),
        "by_size": _by_size(sizes),
        "largest": [
            {
                "id": name,
                "size": int(sizes[cluster]),
                "text": texts.get(name),
                "members": [
                    {"id": member, "text": texts.get(member)}
                    | (
                        {}
                        if np.isnan(duplicates.similarities[row])
                        else {"similarity": round(float(duplicates.similarities[row]), 4)}
                    )
                    for member, row in zip(members[index], shown[index], strict=True)
                ],
            }
            for index, (cluster, name) in enumerate(zip(largest, names, strict=True))
        ],
    }


def _by_size(sizes: np.ndarray) -> list[dict[str, int]]:
    rows = []
    start = 2
    while start <= sizes.max(initial=0):
        inside = (sizes >= start) & (sizes < 2 * start)
        if inside.any():
            rows.append(
                {"from": start, "to": 2 * start - 1, "clusters": int(inside.sum()), "documents": int(sizes[inside].sum())}
            )
        start *= 2
    return rows


def _least_similar(duplicates: DuplicateRemovals, rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(duplicates.similarities[rows], kind="stable")][:_MEMBERS]


def _texts(corpus: Corpus, ids: list[str]) -> dict[str, str]:
    """The beginnings of some documents' texts, by id, those of the earlier corpus too."""
    texts: dict[str, str] = {}
    wanted = pa.array(ids, pa.string())
    for documents in (corpus.earlier, corpus.documents):
        for batch in documents(["id", "text"]) if documents and ids else ():
            hits = batch.filter(pc.is_in(batch.column("id"), wanted))
            beginnings = pc.utf8_slice_codeunits(hits.column("text"), 0, _EXAMPLE_CHARACTERS)
            texts |= dict(zip(hits.column("id").to_pylist(), beginnings.to_pylist(), strict=True))
    return texts


def exact_duplicates(corpus: Corpus) -> DuplicateRemovals:
    """Documents with equal `text_hash`; reasons `duplicate of ID`."""
    return _first_of_equal(corpus, "text_hash", lambda hashes: hashes, "duplicate")


def url_duplicates(corpus: Corpus) -> DuplicateRemovals:
    """Documents whose `url` is the same once normalised; reasons `duplicate url of ID`. Those without one all stay."""

    def hashes(urls: pa.Array) -> pa.Array:
        normalised = (url and normalise_url(url) for url in urls.to_pylist())
        return pa.array([hash_bytes(url.encode()) if url else None for url in normalised], pa.string())

    return _first_of_equal(corpus, "url", hashes, "duplicate url")


def _first_of_equal(corpus: Corpus, column: str, hashes: Callable[[pa.Array], pa.Array], wording: str) -> DuplicateRemovals:
    """16 bytes of hash and 8 of number for each document are all that is gathered."""
    numbers, keys = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.uint64)]
    for batch_numbers, batch in corpus.batches([column]):
        hashed = hashes(batch.column(column))
        numbers.append(batch_numbers[pc.is_valid(hashed).to_numpy(zero_copy_only=False)])
        keys.append(parse_ids(hashed.drop_null()))
    number, key = np.concatenate(numbers), np.concatenate(keys)
    order = np.lexsort((number, key[:, 1], key[:, 0]))
    number, key = number[order], key[order]
    change = np.zeros(len(key), dtype=np.int64)
    change[1:] = (key[1:] != key[:-1]).any(axis=1)
    first = number[first_of_groups(np.cumsum(change))]
    copies = np.flatnonzero(number != first)
    copies = copies[np.argsort(number[copies])]
    return DuplicateRemovals.of(wording, corpus, number[copies], first[copies])


#: Parameters that tell where a visitor came from and do not change the page.
_TRACKING = re.compile(r"utm_\w+|[a-z]{1,2}clid|dclid|fbclid|msclkid|mc_[ce]id|igshid|_ga|_gl|ref_src|spm", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443, "ftp": 21}


def normalise_url(url: str) -> str | None:
    """What addresses of the same page have in common; None for what is not an address with a host.

    Without scheme, user, `www.`, the scheme's own port, tracking parameters, a slash at the end, an index page, and a fragment
    but one that begins with `!`, which names a page; the host in lower case; what is left of the parameters sorted;
    percent-encoding only where it is needed.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    if not host or re.search(r"\s", host) or parts.scheme not in _PORTS:
        return None
    path = re.sub(r"/(index|default)\.(html?|php|aspx?)$", "/", re.sub(r"/{2,}", "/", parts.path))
    path = quote(unquote(path, errors="surrogateescape"), safe="/:@!$&'()*+,;=~-._", errors="surrogateescape").rstrip("/")
    parameters = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not _TRACKING.fullmatch(pair[0])]
    query = urlencode(sorted(parameters))
    return (
        re.sub(r"^(www\.)+", "", host)
        + (f":{port}" if port not in (None, _PORTS[parts.scheme]) else "")
        + path
        + (f"?{query}" if query else "")
        + (f"#{unquote(parts.fragment)}" if parts.fragment.startswith("!") else "")
    )


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
    return _with_counts(repeated_lines(corpus, scratch, **_least(settings)))


def paragraphs(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Paragraphs that stand in an earlier document."""
    return _with_counts(repeated_paragraphs(corpus, scratch, **_least(settings)))


def sentences(corpus: Corpus, scratch: Path, settings: PassagesConfig, folder: Path) -> Result:
    """Runs of sentences that stand in an earlier document."""
    return _with_counts(repeated_sentences(corpus, scratch, span=settings.sentences, **_least(settings)))


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


def _least(settings: PassagesConfig) -> dict[str, int]:
    return {"least_words": settings.least_words, "least_words_left": settings.least_words_left}


def _with_counts(spans: SpanRemovals) -> Result:
    return spans, {"passages": spans.spans, "documents_cut": len(spans.ids)}
