"""Stage `select`: applies limits to scores. Another limit computes no score again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.policy import Policy, read_policy
from bessemer.core.progress import Progress
from bessemer.data.config import LimitConfig, SelectConfig
from bessemer.data.corpus.dataset_card import StageRecord, lineage, write_card
from bessemer.data.corpus.reader import SCHEMA, document_schema
from bessemer.data.corpus.stats import with_reasons
from bessemer.data.deduplication.decontaminate import Contamination, read_items
from bessemer.data.deduplication.removals import apply
from bessemer.data.filters.registry import HAZARD_CATEGORIES
from bessemer.data.stages.mixture import mixed, mixture_columns, mixture_stats, training_bytes
from bessemer.data.stages.transform import Change, transform
from bessemer.data.thresholds import beside_limits, rejection_reasons


def select(
    config: SelectConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write the documents whose scores lie within the limits, and the others with the first rule that they broke; and a
    dataset card of the corpus, `README.md`.

    Raises ConfigError for a limit on a column that the documents do not have, SourceError when nothing is left.
    """
    config, policy = with_policy(config, folder)
    schema = document_schema(documents)
    check_scores(config, schema.names)
    overlap = contamination(config, folder)
    engine = config.where()
    measured = partial(training_bytes, documents, partial(selecting, config, overlap), engine)
    mixtures, sizes = mixture_columns(config.mix, config.anneal, measured)
    for column in mixtures:
        schema = schema.append(pa.field(column, pa.int64()))
    metrics = transform(
        documents,
        out,
        schema,
        partial(selecting, config, overlap, mixtures),
        "applying thresholds",
        engine=engine,
        storage=config.storage,
        progress=progress,
    )
    if not metrics["documents_out"]:
        reason = max(
            metrics["by_reason"], key=lambda name: metrics["by_reason"][name]["documents"], default="no documents came in"
        )
        raise SourceError(f"select: none of {metrics['documents_in']:,} documents is usable; most frequent reason: {reason}")
    if mixtures:
        metrics["mixtures"] = mixture_stats(mixtures, sizes, out / "documents", engine)
    if policy is not None:
        metrics["policy"] = {"name": policy.name, "hash": policy.hash}
    limits, languages = config.limits(), config.language_limits()
    folders = [out / "documents", out / "rejected"]
    metrics["thresholds"] = beside_limits(
        folders, limits, languages, metrics["scores"], config.meant_for(), config.limits_by_language()
    )
    write_card(out, [*lineage(documents), StageRecord("select", config.output_settings(), metrics)])
    return metrics


def with_policy(config: SelectConfig, folder: Path) -> tuple[SelectConfig, Policy | None]:
    """The settings with the limits of the policy's categories that its surface `training` refuses, and the policy.

    Raises ConfigError, in one line, for a policy that cannot be read, and for a category that no score is of.
    """
    if config.policy is None:
        return config, None
    policy = read_policy((folder / config.policy).resolve())
    limits = {}
    for name, category in policy.acted_on("training").items():
        if policy.action("training", name) != "refuse":
            continue
        if name not in HAZARD_CATEGORIES:
            raise ConfigError(f"select.policy: no score is of the category {name!r}{nearest(name, list(HAZARD_CATEGORIES))}")
        limits[f"hazards_{name}"] = LimitConfig(max=category.limit)
    return config.model_copy(update={"thresholds": limits | config.thresholds}), policy


def check_scores(config: SelectConfig, columns: Sequence[str]) -> None:
    """Raises ConfigError when a limit is on a column that the documents do not have."""
    scores = [name for name in columns if name not in SCHEMA.names]
    for name in [*(["language", "language_score"] if config.language_limits() else []), *config.limits()]:
        if name not in columns:
            raise ConfigError(f"select: the documents have no score {name!r}; add it to clean.score{nearest(name, scores)}")


def contamination(config: SelectConfig, folder: Path) -> Contamination | None:
    """The index of the evaluation sets that the settings name. Raises SourceError for a file that is none."""
    if not config.decontaminate:
        return None
    items = [item for path in evaluation_files(config, folder) for item in read_items(path)]
    least = min(8, config.decontaminate_ngram)
    return Contamination.of(items, ngram=config.decontaminate_ngram, least_words=least, mask=config.decontaminate_mask)


def evaluation_files(config: SelectConfig, folder: Path) -> list[Path]:
    """The files of evaluation sets. Raises SourceError for one that does not exist."""
    paths = [(folder / name).resolve() for name in config.decontaminate]
    for path in paths:
        if not path.is_file():
            raise SourceError(f"select.decontaminate: there is no file {path}")
    return paths


def _refused(config: SelectConfig, batch: pa.RecordBatch) -> pa.Array:
    """Reasons to refuse documents whatever their texts: an objection, or a licence that is not accepted."""
    reasons = pa.nulls(batch.num_rows, pa.string())
    if config.opted_out == "drop":
        objection = pc.map_lookup(batch.column("metadata"), pa.scalar("opt_out"), "first")
        reasons = pc.if_else(pc.is_valid(objection), pa.scalar("opted out"), reasons)
    if config.licenses:
        stated = pc.fill_null(batch.column("license"), "unknown")
        label = pc.binary_join_element_wise("license:", stated, " ")
        reasons = pc.coalesce(reasons, pc.if_else(pc.is_in(stated, pa.array(config.licenses)), None, label))
    return reasons


def selecting(
    config: SelectConfig, overlap: Contamination | None = None, mixtures: Mapping[str, Mapping[str, float]] | None = None
) -> Change:
    """The function that says of each document in a batch why it is dropped, if it is, and how often it is read."""
    limits, languages = config.limits(), config.language_limits()
    meant_for, by_language = config.meant_for(), config.limits_by_language()

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        given = {name: batch.column(name) for name in batch.schema.names}
        reasons = pc.coalesce(_refused(config, batch), rejection_reasons(given, limits, languages, meant_for, by_language))
        if overlap is not None:
            batch, more = apply([overlap], batch)
            reasons = pc.coalesce(reasons, more)
        if mixtures:
            batch, more = mixed(batch, mixtures)
            reasons = pc.coalesce(reasons, more)
        return with_reasons(batch, reasons)

    return change
