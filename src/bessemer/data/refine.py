"""Stages `clean`, `deduplicate` and `select`: documents in, documents and rejected documents with their reason out.

Scores and thresholds are apart: `clean` writes a column per score and drops nothing, `select` applies limits to the
columns, so that another limit computes no score again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.config import CleanConfig, DeduplicateConfig, SelectConfig
from bessemer.data.documents import SCHEMA, DocumentWriter, count_documents, document_schema
from bessemer.data.engine import batches, load_daft, read_documents, with_columns
from bessemer.data.filters import gopher
from bessemer.data.filters import language as languages
from bessemer.data.funnel import describe
from bessemer.data.selection import rejection_reasons

_REASON = {"reason": pa.string()}


@dataclass(frozen=True)
class Scorer:
    """A function from texts to score columns, and which columns those are."""

    columns: Mapping[str, pa.DataType]
    function: Callable[[pa.Array], Mapping[str, pa.Array]]


SCORERS = {
    "language": Scorer(languages.COLUMNS, languages.language),
    "gopher_quality": Scorer(gopher.COLUMNS, gopher.gopher_quality),
}


def clean(
    config: CleanConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents with their scores to `out/documents`, and return the stage's metrics.

    A user's `file.py:function` (relative to `folder`) gets an Arrow array of texts and returns one number for each;
    its column has the function's name. Raises ConfigError when such a function cannot be loaded.
    """
    frame = read_documents(documents)
    schema = document_schema(documents)
    for name in config.score:
        scorer = _user_scorer(name, folder) if is_user_function(name) else SCORERS[name]
        frame = with_columns(frame, ["text"], scorer.columns, scorer.function)
        for column, kind in scorer.columns.items():
            if column not in schema.names:
                schema = schema.append(pa.field(column, kind))
    frame = with_columns(frame, ["id"], _REASON, _nothing_wrong)
    return _write(frame, schema, documents, out, "scoring documents", progress)


def deduplicate(
    config: DeduplicateConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents without copies: of those with the same text hash the one with the smallest id stays."""
    col = load_daft().col
    frame = read_documents(documents)
    if "exact" in config.methods:
        copies = (  # hashes and ids alone: no text is moved to find out
            read_documents(documents)
            .select("id", "text_hash")
            .groupby("text_hash")
            .agg(col("id").min().alias("survivor"), col("id").count().alias("copies"))
            .where(col("copies") > 1)
            .select("text_hash", "survivor")
        )
        frame = frame.join(copies, on="text_hash", how="left")
        frame = with_columns(frame, ["id", "survivor"], _REASON, _copy_of_survivor).exclude("survivor")
    else:
        frame = with_columns(frame, ["id"], _REASON, _nothing_wrong)
    return _write(frame, document_schema(documents), documents, out, "looking for duplicates", progress)


def select(
    config: SelectConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents whose scores lie within the limits, and the others with the first rule that they broke.

    Raises ConfigError for a limit on a column that the documents do not have, SourceError when nothing is left.
    """
    limits, schema = config.limits(), document_schema(documents)
    inputs = [*(["language", "language_score"] if config.languages else []), *limits, "id"]
    inputs = list(dict.fromkeys(inputs))
    scores = [name for name in schema.names if name not in SCHEMA.names]
    for name in inputs:
        if name not in schema.names:
            raise ConfigError(f"select: the documents have no score {name!r}; add it to clean.score{nearest(name, scores)}")

    def reasons(*columns: pa.Array) -> dict[str, pa.Array]:
        given = dict(zip(inputs, columns, strict=True))
        return {"reason": rejection_reasons(given, limits, config.languages)}

    frame = with_columns(read_documents(documents), inputs, _REASON, reasons)
    metrics = _write(frame, schema, documents, out, "applying thresholds", progress)
    if not metrics["documents_out"]:
        reason = max(
            metrics["by_reason"], key=lambda name: metrics["by_reason"][name]["documents"], default="no documents came in"
        )
        raise SourceError(f"select: none of {metrics['documents_in']:,} documents is usable; most frequent reason: {reason}")
    return metrics


def _write(
    frame: Any, schema: pa.Schema, documents: Path, out: Path, description: str, progress: Progress | None
) -> dict[str, Any]:
    """Run the frame and part its rows by their `reason`: null is kept."""
    reason = pa.field("reason", pa.string(), nullable=False)
    total = count_documents(documents)
    with (
        (progress or Silent()).task(description, total=total, unit="documents") as task,
        DocumentWriter(out / "documents", schema) as kept,
        DocumentWriter(out / "rejected", schema.append(reason)) as rejected,
    ):
        for batch in batches(frame, schema.append(pa.field("reason", pa.string()))):
            is_kept = pc.is_null(batch.column("reason"))
            kept.write(batch.filter(is_kept))
            rejected.write(batch.filter(pc.invert(is_kept)))
            task.advance(batch.num_rows)
    return describe(out)


def _nothing_wrong(ids: pa.Array) -> dict[str, pa.Array]:
    return {"reason": pa.nulls(len(ids), pa.string())}


def _copy_of_survivor(ids: pa.Array, survivors: pa.Array) -> dict[str, pa.Array]:
    is_copy = pc.fill_null(pc.not_equal(ids, survivors), False)
    said = pc.binary_join_element_wise("duplicate of", pc.fill_null(survivors, ""), " ")
    return {"reason": pc.if_else(is_copy, said, None)}


def _user_scorer(name: str, folder: Path) -> Scorer:
    column = name.rpartition(":")[2]
    return Scorer({column: pa.float64()}, partial(_user_scores, load_user_function(name, folder), name, column))


def _user_scores(
    function: Callable[[pa.Array], Iterable[float]], name: str, column: str, texts: pa.Array
) -> dict[str, pa.Array]:
    try:
        found = function(texts)
        scores = found if isinstance(found, pa.Array) else pa.array(list(found), pa.float64())
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise ConfigError(f"{name}: it returned {len(scores)} scores for {len(texts)} texts; one number per text is needed")
    return {column: scores.cast(pa.float64())}
