"""Semantic duplicates: close neighbours among given embeddings (SemDeDup, Abbas et al. 2023).

Embeddings come from Parquet files with the columns `id` and `embedding`. Spherical k-means parts them into about sqrt(N)
clusters; within each, from the smallest id on, a document drops all others whose cosine with it reaches the threshold. So
every dropped document is that close to one that stays: chains, along which meaning drifts, are not followed.

Embeddings are rounded to integers (unit length is 4,096, an error of about 0.0001 in a cosine). From there on everything is
integer arithmetic or single correctly rounded operations: results do not depend on threads, batches or matrix libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.errors import ConfigError
from bessemer.data.deduplication.corpus import Corpus, Parts, parse_ids, ranks, write_ids
from bessemer.data.deduplication.removals import DuplicateRemovals
from bessemer.data.deduplication.words import fold_table, hash_words, mixed, most_words, run_hash
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.texts import Texts

# rows of a file in memory at a time
_ROWS = 1 << 12


def embedding_files(place: Path) -> list[Path]:
    """The file itself, or the `*.parquet` of a folder. Raises ConfigError when there is none."""
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise ConfigError(f"deduplicate.semantic.embeddings: there is no Parquet file at {place}")
    return files


def read_embeddings(place: Path) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Ids, (N,) strings, and their embeddings, (N, D) float64, some thousand at a time.

    place: a Parquet file, or a folder of some, with `id` (of documents, as `collect` wrote them) and `embedding` (a list of as
    many numbers in every row). Raises ConfigError for a file that is none.
    """
    dimensions = None
    for path in embedding_files(place):
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=["id", "embedding"]):
                    vectors = _matrix(batch.column("embedding"))
                    if batch.num_rows and dimensions not in (None, vectors.shape[1]):
                        raise ValueError(f"embeddings of {dimensions} and of {vectors.shape[1]} numbers")
                    dimensions = vectors.shape[1] if batch.num_rows else dimensions
                    yield batch.column("id").cast(pa.string()), vectors
        except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{path}: this is no file of embeddings, with `id` and as many numbers in each `embedding` ({error})"
            ) from None


def _matrix(column: pa.Array) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"{column.null_count} embeddings are null")
    sizes = np.unique(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    if len(sizes) > 1:
        raise ValueError(f"embeddings of {sizes[0]} and of {sizes[1]} numbers")
    values = pc.list_flatten(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values.reshape(len(column), int(sizes[0]) if len(sizes) else 1)


#: Texts, (N,) strings, to embeddings, (N, D) floats of any length; a row of zeros is similar to no other.
Embed = Callable[[pa.Array], np.ndarray]
#: Ids, (N,) strings, and their embeddings, (N, D) floats, in any order, in batches of any size.
Embeddings = Iterable[tuple[pa.Array, np.ndarray]]

_UNIT = 4096.0
#: Digits of a logarithm that are kept: the last ones differ between processors.
_DECIMALS = 6
# embeddings from which the centroids are computed
_SAMPLE = 1 << 14
# embeddings in memory while all are assigned to clusters
_AT_ONCE = 1 << 12


def semantic_duplicates(
    corpus: Corpus,
    scratch: Path,
    embed: Embed | None = None,
    *,
    embeddings: Embeddings | None = None,
    threshold: float = 0.95,
    clusters: int | None = None,
    iterations: int = 8,
) -> DuplicateRemovals:
    """Documents whose embedding's cosine with that of one that stays is at least `threshold`.

    embed: without one, `HashedTfIdf` of this corpus, which needs no model and knows shared vocabulary, not meaning.
    embeddings: in its place those of all documents, computed before; those of others are passed over.
    clusters: how many, about sqrt(N) where it is not given; neighbours in different clusters are missed, larger clusters cost
    more: D * N^2 / clusters products at most, and D * N * clusters to assign. Reasons are `semantic duplicate of ID (0.97)`.
    scratch: a folder for a file of 2 * D bytes a document. Raises ValueError when `embed` returns another number of rows,
    ConfigError when `embeddings` lack a document or have one twice.
    """
    if embeddings is None:
        by_batch = _computed(corpus, embed or HashedTfIdf.of(corpus))
    else:
        by_batch = _given(corpus, embeddings)
    with Parts(scratch / "embeddings", "<i2", 1) as store:
        numbers, dimensions = _spill_embeddings(by_batch, store)
        if len(numbers) < 2:
            return DuplicateRemovals.of("semantic duplicate", corpus, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        order = np.argsort(numbers)
        centroids = _k_means(store, dimensions, order, clusters or math.isqrt(len(numbers) - 1) + 1, iterations)
        assigned = np.concatenate([_nearest(vectors, centroids) for vectors in _stream(store, dimensions)])
        near: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        by_cluster = order[np.argsort(assigned[order], kind="stable")]
        for rows in np.split(by_cluster, np.flatnonzero(np.diff(assigned[by_cluster])) + 1):
            vectors = store.take(0, rows, dimensions)
            survivors, similarities = _drop_neighbours(vectors, threshold)
            gone = np.flatnonzero(survivors >= 0)
            near.append((numbers[rows[gone]], numbers[rows[survivors[gone]]], similarities[gone]))
    dropped, survivor, similarity = (np.concatenate(column) for column in zip(*near, strict=True))
    return DuplicateRemovals.of("semantic duplicate", corpus, dropped, survivor, similarity)


def _computed(corpus: Corpus, embed: Embed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of documents and the embeddings of their texts."""
    for numbers, batch in corpus.batches():
        embeddings = np.asarray(embed(batch.column("text")), dtype=np.float64)
        if embeddings.ndim != 2 or len(embeddings) != len(numbers):
            raise ValueError(f"{len(numbers)} texts need an embedding each, not an array of shape {embeddings.shape}")
        yield numbers, embeddings


def _given(corpus: Corpus, embeddings: Embeddings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of documents and the embeddings that were computed for them, each document once."""
    seen = np.zeros(len(corpus), dtype=bool)
    for ids, vectors in embeddings:
        wanted = parse_ids(ids)
        for start, end in ((0, corpus.first), (corpus.first, len(corpus))):
            rows = ranks(corpus.ids[start:end], wanted)
            hits = np.flatnonzero(rows >= 0)
            rows = start + rows[hits]
            if seen[rows].any() or len(np.unique(rows)) < len(rows):
                raise ConfigError("deduplicate.semantic.embeddings: a document has two embeddings")
            seen[rows] = True
            yield (rows if corpus.numbers is None else corpus.numbers[rows]), vectors[hits]
    if not seen.all():
        first = write_ids(corpus.ids[~seen][:1])[0]
        raise ConfigError(
            f"deduplicate.semantic.embeddings: {int((~seen).sum()):,} documents have no embedding; the first of them is {first}"
        )


def _spill_embeddings(by_batch: Iterable[tuple[np.ndarray, np.ndarray]], store: Parts) -> tuple[np.ndarray, int]:
    """Put rounded embeddings of unit length on disk; returns the numbers of their documents in that order, and D."""
    numbers = [np.zeros(0, dtype=np.int64)]
    dimensions = 1
    for batch_numbers, embeddings in by_batch:
        dimensions = embeddings.shape[1]
        lengths = np.sqrt((embeddings**2).sum(axis=1))
        usable = np.isfinite(lengths) & (lengths > 0)
        store.append(0, np.rint(embeddings[usable] / lengths[usable, None] * _UNIT).astype(np.int16).reshape(-1))
        numbers.append(batch_numbers[usable])
    return np.concatenate(numbers), dimensions


def _stream(store: Parts, dimensions: int) -> Iterator[np.ndarray]:
    total = len(store.mapped(0)) // dimensions
    for start in range(0, total, _AT_ONCE):
        yield np.array(store.mapped(0).reshape(-1, dimensions)[start : start + _AT_ONCE])


def _k_means(store: Parts, dimensions: int, order: np.ndarray, clusters: int, iterations: int) -> np.ndarray:
    """Centroids, (K, D) int16 of unit length, from a sample that is spread evenly over the order of ids."""
    sample = order[np.linspace(0, len(order) - 1, min(len(order), max(_SAMPLE, 16 * clusters))).astype(np.int64)]
    vectors = store.take(0, sample, dimensions)
    centroids = vectors[np.linspace(0, len(vectors) - 1, min(clusters, len(vectors))).astype(np.int64)]
    for _ in range(iterations):
        sums = np.zeros((len(centroids), dimensions), dtype=np.int64)
        np.add.at(sums, _nearest(vectors, centroids), vectors)
        lengths = np.sqrt((sums**2).sum(axis=1).astype(np.float64))
        # the centroid of an empty cluster stays
        moved = lengths > 0
        centroids[moved] = np.rint(sums[moved] / lengths[moved, None] * _UNIT).astype(np.int16)
    return centroids


@compiled
def _dot(left: np.ndarray, right: np.ndarray) -> np.int32:
    """Product of vectors of length 4,096; it is below 2^25, so that 32 bits hold it."""
    total = np.int32(0)
    for index in range(len(left)):
        total += np.int32(left[index]) * np.int32(right[index])
    return total


@compiled_allocating
def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """For each vector, (N, D), the centroid, of (K, D), with the largest product; the first of equals."""
    nearest = np.zeros(len(vectors), dtype=np.int64)
    for row in range(len(vectors)):
        best = _dot(vectors[row], centroids[0])
        for cluster in range(1, len(centroids)):
            product = _dot(vectors[row], centroids[cluster])
            if product > best:
                best, nearest[row] = product, cluster
    return nearest


@compiled_allocating
def _drop_neighbours(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """For each vector the row, before it, that drops it, or -1, and their cosine. A row that is dropped drops no other."""
    survivors = np.full(len(vectors), -1, dtype=np.int64)
    similarities = np.zeros(len(vectors), dtype=np.float32)
    lengths = np.empty(len(vectors))
    for row in range(len(vectors)):
        lengths[row] = np.sqrt(np.float64(_dot(vectors[row], vectors[row])))
    for row in range(len(vectors)):
        if survivors[row] >= 0:
            continue
        for other in range(row + 1, len(vectors)):
            if survivors[other] < 0:
                cosine = min(_dot(vectors[row], vectors[other]) / (lengths[row] * lengths[other]), 1.0)
                if cosine >= threshold:
                    survivors[other], similarities[other] = row, cosine
    return survivors, similarities


@dataclass(frozen=True)
class HashedTfIdf:
    """Words and pairs of words, weighted by how rare they are, added up in a few hundred dimensions by hashing.

    Each feature has a random sign in each of `_PLACES` dimensions (a sparse random projection; Achlioptas 2003), so that
    cosines are those of the full TF-IDF vectors but for noise of about 1 / sqrt(dimensions).
    weights (2^18,) float64: inverse document frequency by hash of the feature.
    """

    weights: np.ndarray
    dimensions: int

    @classmethod
    def of(cls, corpus: Corpus, dimensions: int = 256) -> HashedTfIdf:
        """Counts in how many documents each feature occurs; one reading of the corpus."""
        counts = np.zeros(1 << _FEATURE_BITS, dtype=np.int64)
        for _, texts in corpus.texts():
            _count_documents(texts.data, texts.offsets, fold_table("similar"), counts)
        return cls(np.round(np.log((1 + len(corpus)) / (1 + counts)) + 1, _DECIMALS), dimensions)

    def __call__(self, texts: pa.Array) -> np.ndarray:
        """Embeddings (N, dimensions) float32 of texts; zeros for a text without words."""
        batch = Texts.from_arrow(texts)
        vectors = np.zeros((len(batch), self.dimensions))
        _project(batch.data, batch.offsets, fold_table("similar"), self.weights, vectors)
        return vectors.astype(np.float32)


_FEATURE_BITS = 18
_PLACES = 4


@compiled_allocating
def _features(data: np.ndarray, position: int, end: int, fold: np.ndarray, features: np.ndarray) -> int:
    """Hashes of all words and pairs of words, sorted; `features` holds twice the most words. Returns their number."""
    nowhere = np.empty((0, 2), dtype=np.int64)
    count, _ = hash_words(data, position, end, fold, features, nowhere, 0)
    for word in range(count - 1):
        features[count + word] = run_hash(features, word, 2)
    total = max(2 * count - 1, 0)
    features[:total].sort()
    return total


@compiled_allocating
def _count_documents(data: np.ndarray, offsets: np.ndarray, fold: np.ndarray, counts: np.ndarray) -> None:
    features = np.empty(2 * most_words(longest_text(offsets)), dtype=np.uint64)
    for text in range(len(offsets) - 1):
        total = _features(data, offsets[text], offsets[text + 1], fold, features)
        for index in range(total):
            if index == 0 or features[index] != features[index - 1]:
                counts[np.int64(features[index] >> np.uint64(64 - _FEATURE_BITS))] += 1


@compiled_allocating
def _project(data: np.ndarray, offsets: np.ndarray, fold: np.ndarray, weights: np.ndarray, vectors: np.ndarray) -> None:
    features = np.empty(2 * most_words(longest_text(offsets)), dtype=np.uint64)
    dimensions = vectors.shape[1]
    for text in range(len(offsets) - 1):
        total = _features(data, offsets[text], offsets[text + 1], fold, features)
        start = 0
        while start < total:
            feature = features[start]
            end = start
            while end < total and features[end] == feature:
                end += 1
            weight = round(1 + np.log(end - start), _DECIMALS) * weights[np.int64(feature >> np.uint64(64 - _FEATURE_BITS))]
            for place in range(_PLACES):
                chosen = mixed(feature + np.uint64(place + 1))
                signed = weight if chosen & np.uint64(1) else -weight
                vectors[text, np.int64((chosen >> np.uint64(1)) % np.uint64(dimensions))] += signed
            start = end
