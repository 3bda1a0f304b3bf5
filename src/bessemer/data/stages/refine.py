"""The stages clean, select and deduplicate as one function of Arrow tables in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.data.config import CleanConfig, DeduplicateConfig, SelectConfig
from bessemer.data.corpus.reader import SCHEMA, TRAIN, document_id, document_schema, iterate_documents
from bessemer.data.corpus.stats import REASON
from bessemer.data.corpus.writer import write_documents
from bessemer.data.filters.word_model import OpenModel
from bessemer.data.stages.clean import clean
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select
from bessemer.data.text.texts import hash_text

_STAGES: tuple[tuple[str, Any, Any], ...] = (
    ("clean", CleanConfig, clean),
    ("select", SelectConfig, select),
    ("deduplicate", DeduplicateConfig, deduplicate),
)


def refine(
    documents: pa.Table,
    config: Mapping[str, Any] | None = None,
    *,
    folder: Path | str = ".",
    progress: Progress | None = None,
    open_model: OpenModel | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Clean, select and deduplicate documents. Returns those that are kept, with their scores, and those that are not.

    documents: at least a column `text`; `id`, `url`, `language`, `license`, `source`, `split` and `metadata` are used where
    there are such. An id is made of the text where there is none, so that of equal texts one is left. config: a recipe's
    sections `clean`, `select` and `deduplicate`, as mappings, lists or settings, in any order; an absent one is a stage
    skipped. The rejected table has a `reason` and the stage that it comes from, `rejected_by`. Both are sorted by id.
    open_model: opens a language model for the score `perplexity`; `bessemer.refine` brings it.
    Raises ConfigError for a mistake in the settings, a table without texts, or a text that is null.
    """
    config = {} if config is None else config
    known = [name for name, _, _ in _STAGES]
    for name in config:
        if name not in known:
            raise ConfigError(f"refine: there is no stage {name!r}{nearest(name, known)}")
    rejected: list[pa.Table] = []
    with TemporaryDirectory(prefix="bessemer-refine-") as place:
        current = Path(place) / "documents"
        write_documents(current, [_complete(documents)])
        for name, kind, stage in _STAGES:
            if name in config:
                out = Path(place) / name
                out.mkdir()
                more = {"open_model": open_model} if name == "clean" else {}
                stage(kind.parse(config[name], name), current, out, folder=Path(folder), progress=progress, **more)
                dropped_here = _table(out / "rejected")
                rejected.append(dropped_here.append_column("rejected_by", pa.array([name] * len(dropped_here), pa.string())))
                current = out / "documents"
        kept = _table(current)
    empty = kept.schema.append(REASON).append(pa.field("rejected_by", pa.string())).empty_table()
    dropped = pa.concat_tables([empty, *rejected], promote_options="default")
    return kept, dropped.sort_by("id")


def _complete(documents: pa.Table) -> pa.Table:
    """The columns of a document, those that are missing filled in; other columns are left out."""
    if "text" not in documents.schema.names:
        raise ConfigError(f"refine: the table has no column 'text', only {', '.join(documents.schema.names) or 'none'}")
    if documents.column("text").null_count:
        raise ConfigError(f"refine: {documents.column('text').null_count} texts are null")
    texts = documents.column("text").to_pylist()
    made = {
        "id": lambda: [document_id("refine", text) for text in texts],
        "text_hash": lambda: [hash_text(text) for text in texts],
        "source": lambda: ["refine"] * len(texts),
        "split": lambda: [TRAIN] * len(texts),
    }
    columns = {}
    for field in SCHEMA:
        if field.name in documents.schema.names:
            columns[field.name] = documents.column(field.name).cast(field.type)
        else:
            columns[field.name] = pa.array(made[field.name]() if field.name in made else [None] * len(texts), field.type)
    return pa.table(columns, schema=SCHEMA)


def _table(folder: Path) -> pa.Table:
    return pa.Table.from_batches(list(iterate_documents(folder)), document_schema(folder)).sort_by("id")
