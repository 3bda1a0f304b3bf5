"""Settings of an index, and of the stages `index`, `cited` and `questions`. Imports nothing heavy."""

from __future__ import annotations

from typing import ClassVar

from bessemer.core.config import Config, setting

#: Raised when the same documents and settings give another index, or other conversations, than before.
INDEX_VERSION = 3
CITED_VERSION = 2
QUESTIONS_VERSION = 1


class IndexConfig(Config):
    """How documents are cut and embedded."""

    passage_characters: int = setting(1000, "longest passage", unit="characters", ge=100, le=20_000)
    overlap_characters: int = setting(
        120, "most characters that neighbouring passages share, in whole sentences", unit="characters", ge=0
    )
    embedder: str = setting(
        "minilm",
        "embedder of the passages: minilm, the folder of an encoder or of a language model, or URL#MODEL; none: search by "
        "words only",
    )


class IndexStageConfig(IndexConfig):
    """A recipe's `index:` section: documents that later stages, `search`, `ask` and `serve` find passages in."""

    shorthand: ClassVar[str | None] = "documents"

    documents: list[str] = setting(
        description="files, folders, or sources such as python_docs, as `bessemer index` takes them", min_length=1
    )


class CitedConfig(Config):
    """A recipe's `cited:` section: conversations made from an index, which teach a model to answer from sources and cite them
    (`bessemer questions --cited`)."""

    count: int = setting(240, "most conversations, each on another document", ge=1)
    unanswered: float = setting(0.25, "share whose sources do not hold the answer, which says so", ge=0, le=1)
    longest: int = setting(500, "most characters of a source; passages with more take no part", unit="characters", ge=100)
    most_sources: int = setting(4, "most sources of a conversation, which has one at least", ge=1, le=8)


class QuestionsConfig(Config):
    """A recipe's `questions:` section: questions made from an index with the passages that answer them and others, which train
    an embedder (`bessemer questions --negatives`)."""

    count: int = setting(2000, "most questions, each on another document", ge=1)
    negatives: int = setting(4, "most passages beside each that a search finds and that do not answer it", ge=0, le=32)
