"""Stage `clean`: edits texts, then scores them. Only what an edit empties is dropped: `select` applies limits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.progress import Progress
from bessemer.data.config import CleanConfig
from bessemer.data.corpus.reader import document_schema
from bessemer.data.corpus.reasons import with_reasons
from bessemer.data.corpus.text_hash import rehashed
from bessemer.data.corpus.writer import as_type
from bessemer.data.filters.perplexity import OpenModel
from bessemer.data.stages.clean_steps import FAILED, check_failures, edits, scorers
from bessemer.data.stages.transform import Change, transform
from bessemer.data.text.texts import Texts

_EMPTIED = "clean: nothing is left"


def clean(
    config: CleanConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
    open_model: OpenModel | None = None,
) -> dict[str, Any]:
    """Write the documents with their scores to `out/documents`, and return the stage's metrics.

    A user's `file.py:function` (relative to `folder`) gets an Arrow array of texts and returns one number for each;
    its column has the function's name. A document on which it fails is rejected. open_model: opens a language model for the
    score `perplexity`.
    Raises ConfigError when such a function cannot be loaded, fails on most documents, or gives what is no answer.
    """
    schema = cleaned_schema(config, document_schema(documents), folder, open_model)
    metrics = transform(
        documents,
        out,
        schema,
        partial(cleaning, config, schema, folder.absolute(), open_model),
        "editing and scoring documents" if config.edit else "scoring documents",
        engine=config.where(),
        storage=config.storage,
        progress=progress,
    )
    check_failures(config, metrics)
    return metrics


def cleaned_schema(config: CleanConfig, schema: pa.Schema, folder: Path, open_model: OpenModel | None = None) -> pa.Schema:
    """A schema with the columns that the edits and scores add to it, in the order in which they are asked for."""
    added = [each.columns for each in edits(config, folder)] + [each.columns for each in scorers(config, folder, open_model)]
    for columns in added:
        for name, kind in columns.items():
            if name not in schema.names:
                schema = schema.append(pa.field(name, kind))
    return schema


def cleaning(config: CleanConfig, schema: pa.Schema, folder: Path, open_model: OpenModel | None = None) -> Change:
    """The function that edits and scores a batch of documents."""
    steps = edits(config, folder)
    measures = scorers(config, folder, open_model)

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        before = batch.column("text")
        texts, columns = Texts.from_arrow(before), {name: batch.column(name) for name in batch.schema.names}
        failures = []
        for step in steps:
            edited, counts = step.function(texts)
            texts = Texts.from_arrow(edited)
            failures.append(counts.get(FAILED))
            columns |= counts
        for measure in measures:
            scores = measure.function(texts if measure.reads == "text" else _texts_of(batch.column(measure.reads)))
            failures.append(scores.get(FAILED))
            columns |= scores
        blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts.array)), 0)
        # what is dropped is shown as it was
        columns["text"] = pc.if_else(blank, before, texts.array)
        if steps:
            columns["text_hash"] = rehashed(before, columns["text"], batch.column("text_hash"))
        rows = pa.RecordBatch.from_arrays([as_type(columns[field.name], field.type) for field in schema], schema=schema)
        reasons = [pc.if_else(blank, pa.scalar(_EMPTIED), pa.scalar(None, pa.string())), *failures]
        return with_reasons(rows, pc.coalesce(*(reason for reason in reasons if reason is not None)))

    return change


def _texts_of(column: pa.Array) -> Texts:
    return Texts.from_arrow(pc.fill_null(column, ""))
