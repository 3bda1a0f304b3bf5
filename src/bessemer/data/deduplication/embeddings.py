"""Reader of given embeddings: Parquet files with the columns `id` and `embedding`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bessemer.core.errors import ConfigError

# that are in memory at a time
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
