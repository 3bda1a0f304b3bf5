"""The stage `tokenize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.data.config import CollectConfig, source_name
from bessemer.data.corpus.at_hand import documents_of
from bessemer.tokenization import report
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig


def _tokenize_packages(config: TokenizeConfig) -> list[str]:
    names = ["pyarrow", "tokenizers", "fastokens", "rustbpe"]
    return [*names, "sentencepiece"] if config.algorithm in ("unigram", "sentencepiece_bpe") else names


def _tokenize(context: StageContext) -> dict[str, Any]:
    from bessemer.tokenization.stage import tokenize

    documents = documents_of(context)
    assert documents is not None
    return tokenize(context.config, documents, context.out, seed=context.seed, progress=context.progress, folder=context.folder)


def _tokenize_fingerprint(config: TokenizeConfig, outside: Outside) -> Any:
    if config.tokenizer is None:
        return None
    from bessemer.tokenization.existing import existing_fingerprint

    return existing_fingerprint(config.tokenizer, outside.folder)


def _unknown_source(config: TokenizeConfig, above: Mapping[str, Any]) -> str | None:
    """A weight of a source that the recipe does not collect, found before hours of work on the corpus."""
    collect = last_of(above, CollectConfig)
    names = [source_name(source) for source in collect.sources] if collect is not None else []
    unknown = next((source for source in config.source_weights if names and source not in names), None)
    return None if unknown is None else f"source_weights: no source is named {unknown!r}{nearest(unknown, names)}"


STAGES = (
    StageSpec(
        kind="tokenize",
        summary="Train a tokenizer, or take an existing one, and write the documents as token shards.",
        config=TokenizeConfig,
        version=TOKENIZE_VERSION,
        needs={"documents": "documents"},
        makes={"tokenizer": "tokenizer", "tokens": "tokens"},
        links={"tokenizer": "tokenizer", "tokens": "tokens"},
        example="tokenize: {vocab_size: 4096}",
        remedy="make again: its tokens hold the text, and its tokenizer may have learned from it",
        budget_seconds=4,
        report=report.report,
        summary_line=report.summary_line,
        run=_tokenize,
        uses_seed=True,
        resumes=True,
        fingerprint=_tokenize_fingerprint,
        packages=_tokenize_packages,
        conflict=_unknown_source,
    ),
)
