"""Deduplication methods: their settings and declarations. Pure Python: a recipe is checked without the methods' code."""

from __future__ import annotations

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.plugins import MethodFunction, MethodPlugin, Strings


class MinHashConfig(Config):
    """Near duplicates (Broder 1997): `bands` × `rows` hashes of runs of words find candidates."""

    ngram: int = setting(5, "words in a shingle", ge=1)
    bands: int = setting(14, "two documents are compared when all hashes of one band agree", ge=1, le=256)
    rows: int = setting(8, "hashes in a band", ge=1, le=256)
    threshold: float = setting(0.8, "least Jaccard similarity of near duplicates", gt=0, le=1)
    verify: bool = setting(True, "compute the similarity of candidates exactly, on their shingles")


class PassagesConfig(Config):
    """Pieces of text that stand elsewhere too, and are cut where they come again."""

    least_words: int = setting(6, "a repeated line, paragraph or run of sentences with fewer words stays", ge=1)
    sentences: int = setting(3, "sentences in a row, for the method `sentences`", ge=1)
    substring_words: int = setting(50, "least length, for the method `substrings`", unit="words", ge=2)
    least_words_left: int = setting(10, "a document that was cut and has fewer words left is dropped", ge=0)


class SemanticConfig(Config):
    """Documents about the same, in much the same words (Abbas et al. 2023)."""

    threshold: float = setting(0.95, "least cosine of two embeddings", gt=0, le=1)
    # the files' content and the function's code enter the stage's key
    embeddings: str | None = setting(
        None,
        "your model's: a Parquet file, or a folder of some, with `id` and `embedding`, or a `file.py:function` from an Arrow "
        "array of texts to an array (N, D); hashed TF-IDF when absent",
        code=True,
        affects_output=False,
    )
    clusters: int | None = setting(None, "documents are compared within a cluster; about √documents when absent", ge=1)


class KeepConfig(Config):
    """Which of several copies stays: by licence, then by quality, then the one with the smallest id."""

    licenses: list[str] = setting(
        default_factory=list,
        description="the best first, as the sources state them; what states none is the last choice",
    )
    quality: Strings = setting(
        default_factory=list,
        description="score columns, asked one after the other: of two copies the one that has more stays, of `-column` less",
    )


_CODE = "bessemer.data.deduplication.methods"

OWN_METHODS = (
    MethodPlugin("exact", "documents with the same text", f"{_CODE}:exact"),
    MethodPlugin("url", "documents of the same address", f"{_CODE}:url"),
    MethodPlugin("minhash", "near duplicates (Broder 1997)", f"{_CODE}:minhash", MinHashConfig, section="minhash"),
    MethodPlugin("lines", "lines that stand in an earlier document", f"{_CODE}:lines", PassagesConfig, section="passages"),
    MethodPlugin(
        "paragraphs", "paragraphs that stand in an earlier document", f"{_CODE}:paragraphs", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "sentences", "runs of sentences that stand elsewhere too", f"{_CODE}:sentences", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "substrings", "long runs of words that stand elsewhere too", f"{_CODE}:substrings", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "semantic", "documents about the same (Abbas et al. 2023)", f"{_CODE}:semantic", SemanticConfig, section="semantic"
    ),
)
METHODS: Registry[MethodFunction] = Registry("method", "bessemer.deduplication", OWN_METHODS)


def method_plugin(name: str) -> MethodPlugin:
    """The declaration of a method, ours or another package's. Raises ConfigError when there is none."""
    plugin = METHODS.find(name)
    if not isinstance(plugin, MethodPlugin):
        raise ConfigError(f"the entry point {name!r} of {METHODS.group} is not a MethodPlugin")
    return plugin
