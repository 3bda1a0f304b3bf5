"""Settings of the data stages: collect, clean, deduplicate, select."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag, field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.object_storage import ObjectPath
from bessemer.core.usercode import is_user_function
from bessemer.data.edits.config import Boilerplate, C4Lines, PersonalData, Repair, Secrets
from bessemer.data.engine import Engine
from bessemer.data.sources.config import (
    SOURCES,
    ChatsSource,
    CodeSource,
    CommonCrawlSource,
    DiscourseSource,
    DocsSource,
    EpubSource,
    HtmlSource,
    HuggingFaceSource,
    LatexSource,
    MboxSource,
    MediaWikiSource,
    PdfSource,
    StackExchangeSource,
    TablesSource,
    UrlsSource,
    WarcSource,
)
from bessemer.data.thresholds.presets import EVERY_LANGUAGE, PRESETS, Languages, Limit, MeantFor, meant_for, preset
from bessemer.data.thresholds.score_limits import LANGUAGE_SCORES, USUAL_LANGUAGE_SCORE

#: Each is raised whenever its stage writes other bytes for the same input (golden outputs in the tests).
COLLECT_VERSION = 3
CLEAN_VERSION = 3
DEDUPLICATE_VERSION = 3
SELECT_VERSION = 4

SCORERS = (
    "language",
    "gopher_quality",
    "gopher_repetition",
    "c4",
    "fineweb",
    "code",
    "spam",
    "toxicity",
    "model_written",
    "hazards",
    "urls",
)
DEDUPLICATION_METHODS = ("exact", "url", "minhash", "lines", "paragraphs", "sentences", "substrings", "semantic")
EDITS = ("repair", "boilerplate", "c4_lines", "c4_terminal_lines", "personal_data", "secrets")

#: The sections of settings, and the edits that read one where they are not called as it is.
_EDIT_SETTINGS: dict[str, type[Config]] = {
    "repair": Repair,
    "boilerplate": Boilerplate,
    "c4_lines": C4Lines,
    "personal_data": PersonalData,
    "secrets": Secrets,
}
_EDITS_OF = {"c4_lines": ("c4_lines", "c4_terminal_lines")}


class WheelsSource(Config):
    """Documentation inside pinned packages, read from the wheel's zip and never installed."""

    source: Literal["wheels"] = setting("wheels", "kind of source")
    lock: str = setting(
        "quickstart", "name of a lock that ships with bessemer, or a requirements file with hashes", affects_output=False
    )
    optional: bool = setting(
        False, "go on without this source, and say so, when the package index cannot be reached", affects_output=False
    )


class PythonDocsSource(Config):
    """Docstrings of the running interpreter's standard library."""

    source: Literal["python_docs"] = setting("python_docs", "kind of source")


class FilesSource(Config):
    """Text on this machine: .txt, .md and .jsonl, plain, compressed or in archives."""

    source: Literal["files"] = setting("files", "kind of source")
    license: str | None = setting(None, "licence of everything in it that states none itself")
    name: str = setting("files", "what the documents' `source` says; two sources of files need two names", min_length=1)
    paths: list[str] = setting(..., "files, folders and patterns such as `texts/*.md`", min_length=1, affects_output=False)
    max_document_bytes: int = setting(
        100_000, "a longer text file becomes several documents, cut at blank lines", unit="bytes", ge=1
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class UserSource(Config):
    """A user's own `file.py:function`, which yields dicts with a `text` and, if it has one, a stable `id`."""

    source: str = setting(..., "`file.py:function`, relative to the recipe", code=True)
    name: str | None = setting(None, "what the documents' `source` says; the function's name where it is not given")
    options: dict[str, Any] = setting(default_factory=dict, description="keyword arguments for the function")


_SOURCES = ("wheels", "python_docs", "files", *SOURCES)


def _kind(value: Any) -> str:
    source = value.get("source") if isinstance(value, dict) else value.source
    return source if source in _SOURCES else "user"


Source = Annotated[
    Annotated[WheelsSource, Tag("wheels")]
    | Annotated[PythonDocsSource, Tag("python_docs")]
    | Annotated[FilesSource, Tag("files")]
    | Annotated[WarcSource, Tag("warc")]
    | Annotated[HtmlSource, Tag("html")]
    | Annotated[UrlsSource, Tag("urls")]
    | Annotated[CommonCrawlSource, Tag("common_crawl")]
    | Annotated[EpubSource, Tag("epub")]
    | Annotated[PdfSource, Tag("pdf")]
    | Annotated[LatexSource, Tag("latex")]
    | Annotated[MediaWikiSource, Tag("mediawiki")]
    | Annotated[DocsSource, Tag("docs")]
    | Annotated[CodeSource, Tag("code")]
    | Annotated[StackExchangeSource, Tag("stack_exchange")]
    | Annotated[DiscourseSource, Tag("discourse")]
    | Annotated[MboxSource, Tag("mbox")]
    | Annotated[ChatsSource, Tag("chats")]
    | Annotated[TablesSource, Tag("tables")]
    | Annotated[HuggingFaceSource, Tag("hugging_face")]
    | Annotated[UserSource, Tag("user")],
    Discriminator(_kind),
]


def source_name(source: Source) -> str:
    """The name under which a source's documents are kept and from which their ids are made."""
    stated: str | None = getattr(source, "name", None)
    return stated or source.source.rpartition(":")[2]


class DataConfig(Config):
    """What every data stage may say about where it runs; nothing of it can change the output."""

    engine: Literal["local", "ray"] = setting(
        "local",
        "`local` (this machine's cores) or `ray` (a cluster, whose workers need `bessemer[data]`)",
        affects_output=False,
    )
    ray_address: str | None = setting(
        None, "the cluster: `auto` or `ray://host:10001`; a new one on this machine when absent", affects_output=False
    )
    processes: bool = setting(
        False, "`local`: processes instead of threads, faster where filters are written in Python", affects_output=False
    )

    storage: str | None = setting(
        None,
        "`s3://bucket/folder` (`gs://`, `az://`): where the documents are put instead of into the run's folder, by the workers "
        "themselves, which then need no disk in common",
        affects_output=False,
    )

    @field_validator("storage")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        try:
            return value and str(ObjectPath.parse(value))
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def where(self) -> Engine:
        """The engine that these settings describe."""
        return Engine(self.engine, self.ray_address, self.processes)


class CollectConfig(DataConfig):
    """Where documents come from, and which of them are held out. A bare list is the list of sources."""

    shorthand: ClassVar[str | None] = "sources"

    sources: list[Source] = setting(..., "what is read, each with its `source`", min_length=1)
    buckets: int = setting(
        16, "parts that the documents lie in, a power of 2: about a gigabyte of text in each is well", ge=1, le=4096
    )
    validation_share: float = setting(
        0.05,
        "share of packages (of files, of records where there are none) held out for validation, chosen by hash",
        ge=0,
        le=0.5,
    )

    @field_validator("buckets")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("buckets must be a power of 2")
        return value

    @field_validator("sources", mode="before")
    @classmethod
    def _known_sources(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        sources = [{"source": item} if isinstance(item, str) else item for item in value]
        for item in sources:
            name = item.get("source") if isinstance(item, dict) else item.source
            if not isinstance(name, str):
                raise ValueError("each source needs a `source`: " + ", ".join(_SOURCES) + " or file.py:function")
            _check_known("source", name, _SOURCES)
        return sources

    @field_validator("sources")
    @classmethod
    def _different_names(cls, value: list[Source]) -> list[Source]:
        names = [source_name(source) for source in value if not isinstance(source, (WheelsSource, PythonDocsSource))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}, and ids are made from names; give one another `name`")
        return value


class CleanConfig(DataConfig):
    """How documents are edited and scored. Nothing is dropped here: `select` applies thresholds to the scores."""

    edit: list[str] = setting(
        default_factory=list,
        description=f"edits of the text, in this order: {', '.join(EDITS)}, pii (the last two) or file.py:function",
        code=True,
    )
    score: list[str] = setting(
        default_factory=lambda: ["language", "gopher_quality", "gopher_repetition"],
        description=f"scores to compute: {', '.join(SCORERS)} or file.py:function",
        code=True,
    )

    repair: Repair = setting(default_factory=Repair, description="settings of the edit `repair`")
    boilerplate: Boilerplate = setting(default_factory=Boilerplate, description="settings of the edit `boilerplate`")
    c4_lines: C4Lines = setting(default_factory=C4Lines, description="settings of the edits `c4_lines` and `c4_terminal_lines`")
    personal_data: PersonalData = setting(default_factory=PersonalData, description="settings of the edit `personal_data`")
    secrets: Secrets = setting(default_factory=Secrets, description="settings of the edit `secrets`")
    word_lists: list[str] = setting(
        default_factory=list, description="your own lists of words and patterns: columns `words_…`", affects_output=False
    )
    url_lists: list[str] = setting(
        default_factory=list, description="your own lists of domains: columns `urls_score_NAME`", affects_output=False
    )
    classifiers: list[str] = setting(
        default_factory=list,
        description="folders made by `bessemer train-classifier`: columns `classifier_NAME`",
        affects_output=False,
    )
    perplexity: str | None = setting(
        None,
        "a folder of `bessemer train-words`, or a model of ours (its folder or a run's): column `perplexity_bits_per_byte`",
        affects_output=False,
    )

    @field_validator("edit", mode="before")
    @classmethod
    def _pii(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [name for item in value for name in (("personal_data", "secrets") if item == "pii" else (item,))]

    @field_validator("edit")
    @classmethod
    def _known_edits(cls, value: list[str]) -> list[str]:
        for name in value:
            _check_known("edit", name, EDITS)
        return value

    @field_validator("score")
    @classmethod
    def _known_scorers(cls, value: list[str]) -> list[str]:
        for name in value:
            _check_known("score", name, SCORERS)
        return value

    @model_validator(mode="after")
    def _settings_of_edits_that_are_named(self) -> CleanConfig:
        usual = {name: kind() for name, kind in _EDIT_SETTINGS.items()}
        for name, settings in usual.items():
            if getattr(self, name) != settings and not any(edit in self.edit for edit in _EDITS_OF.get(name, (name,))):
                raise ValueError(f"{name}: these are settings of an edit that `edit` does not name")
        return self


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
    embeddings: str | None = setting(
        None,
        "your model's: a Parquet file, or a folder of some, with `id` and `embedding`, or a `file.py:function` from an Arrow "
        "array of texts to an array (N, D); hashed TF-IDF when absent",
        code=True,
        affects_output=False,  # what the files hold, and the function's code, enter the key
    )
    clusters: int | None = setting(None, "documents are compared within a cluster; about √documents when absent", ge=1)


class MixConfig(Config):
    """How often the documents of each source are read in training; by `epochs`, else `weights`, else `temperature`."""

    epochs: dict[str, float] = setting(
        default_factory=dict, description="how often a source is read: 2, or 0.5 for half of its documents; others once"
    )
    weights: dict[str, float] = setting(
        default_factory=dict, description="a source's share of the text, in any unit; others are left out"
    )
    temperature: float = setting(1.0, "shares are sizes to the power 1 / temperature: above 1 lifts small sources", gt=0)
    max_epochs: float = setting(4.0, "no source is read more often to reach its share", gt=0)
    max_bytes: int | None = setting(None, "text to be read in all", unit="bytes", ge=1)

    @field_validator("epochs", "weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not 0 <= number < 1000:
                raise ValueError(f"{name}: {number:g} is not between 0 and 1000")
        return value


class MixedConfig(DataConfig):
    """What a stage says that leaves the documents as they are read in training."""

    mix: MixConfig | None = setting(None, "how often each source is read; once when absent")
    anneal: MixConfig | None = setting(None, "a second mixture, for the last phase of training")


class KeepConfig(Config):
    """Which of several copies stays: by licence, then by quality, then the one with the smallest id."""

    licenses: list[str] = setting(
        default_factory=list,
        description="the best first, as the sources state them; what states none is the last choice",
    )
    quality: list[str] = setting(
        default_factory=list,
        description="score columns, asked one after the other: of two copies the one that has more stays, of `-column` less",
    )

    @field_validator("quality", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DeduplicateConfig(MixedConfig):
    """Which documents count as the same, and which of them stays. A bare list is the list of methods."""

    shorthand: ClassVar[str | None] = "methods"

    methods: list[str] = setting(
        default_factory=lambda: ["exact"], description=f"in this order: {', '.join(DEDUPLICATION_METHODS)}"
    )
    against: str | None = setting(
        None,
        "a folder of documents, or a run's `corpus`: what is a copy of something in there is dropped as well",
        affects_output=False,  # what it holds enters the key
    )
    keep: KeepConfig = setting(default_factory=KeepConfig, description="which of several copies stays")
    minhash: MinHashConfig = setting(default_factory=MinHashConfig, description="settings of the method `minhash`")
    passages: PassagesConfig = setting(
        default_factory=PassagesConfig, description="settings of `lines`, `paragraphs`, `sentences` and `substrings`"
    )
    semantic: SemanticConfig = setting(default_factory=SemanticConfig, description="settings of the method `semantic`")

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: list[str]) -> list[str]:
        for name in value:
            _check_known("method", name, DEDUPLICATION_METHODS, user_functions=False)
        if len(set(value)) < len(value):
            raise ValueError("a method is named twice")
        return value


class LimitConfig(Config):
    """The range of a score that is kept, both ends included."""

    min: float | None = setting(None, "lowest score kept")
    max: float | None = setting(None, "highest score kept")
    languages: list[str] | None = setting(
        None, "languages that it is for, `[]` for every one; when absent, those that the score's own limit is meant for"
    )


class SelectConfig(MixedConfig):
    """Which documents are kept, by their scores. A bare word is the preset."""

    shorthand: ClassVar[str | None] = "keep"

    keep: list[str] = setting(
        default_factory=lambda: ["gopher"], description=f"presets of thresholds, all of which hold: {', '.join(PRESETS)}"
    )
    languages: list[str] = setting(
        default_factory=lambda: ["en"], description="languages kept, as ISO 639 codes; empty keeps every language"
    )
    min_language_score: float | None = setting(
        None,
        f"lowest probability of any language that is kept; when absent, each language's own: {USUAL_LANGUAGE_SCORE} for most",
        ge=0,
        le=1,
    )
    language_scores: dict[str, float] = setting(
        default_factory=dict, description="the lowest probability of single languages: `{de: 0.5}`"
    )
    thresholds: dict[str, LimitConfig] = setting(
        default_factory=dict, description="limits per score column, which replace the preset's: `{gopher_words: {min: 20}}`"
    )

    @field_validator("language_scores")
    @classmethod
    def _probabilities(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not 0 <= number <= 1:
                raise ValueError(f"{name}: {number:g} is not between 0 and 1")
        return value

    @model_validator(mode="after")
    def _limits_of_languages_kept(self) -> SelectConfig:
        for name in self.language_scores:
            if self.languages and name not in self.languages:
                raise ValueError(f"language_scores: {name!r} is not among the languages kept: {', '.join(self.languages)}")
        return self

    @field_validator("keep", mode="before")
    @classmethod
    def _one_preset(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("keep")
    @classmethod
    def _known_presets(cls, value: list[str]) -> list[str]:
        for name in value:
            _check_known("preset", name, tuple(PRESETS), user_functions=False)
        return value

    decontaminate: list[str] = setting(
        default_factory=list,
        description="evaluation sets, as JSONL files: documents that hold a piece of an item are dropped",
        affects_output=False,  # what the files hold enters the key
    )
    decontaminate_ngram: int = setting(13, "words in a row that are a piece of an item", ge=2)
    licenses: list[str] = setting(
        default_factory=list,
        description="licences kept, as the sources state them; empty keeps every one, and what states none",
    )
    opted_out: Literal["drop", "keep"] = setting(
        "drop", "documents whose author or site objects to training (metadata `opt_out`; see the sources)"
    )
    decontaminate_mask: bool = setting(False, "cut the piece out of the document instead of dropping it")

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def limits(self) -> dict[str, Limit]:
        """Lowest and highest score kept, by column: the presets', or what `thresholds` states. Languages have limits apart."""
        limits: dict[str, Limit] = {}
        for name in self.keep:
            limits |= preset(name)
        for column, stated in self.thresholds.items():
            lowest, highest = limits.get(column, (None, None))
            given = stated.model_fields_set
            limits[column] = (stated.min if "min" in given else lowest, stated.max if "max" in given else highest)
        return limits

    def meant_for(self) -> dict[str, MeantFor]:
        """For which languages each limit is: as its rule says, or as `thresholds` states; every one for a column not in it."""
        stated = {column: limit.languages for column, limit in self.thresholds.items() if limit.languages is not None}
        found = {column: meant_for(column) for column in self.limits() if column not in stated}
        found |= {column: MeantFor(only=tuple(names)) if names else EVERY_LANGUAGE for column, names in stated.items()}
        return {column: scope for column, scope in found.items() if scope}

    def language_limits(self) -> Languages:
        """The languages kept with their lowest probabilities: stated for one, stated for all, or the language's own.

        Where every language is kept there is no limit but a stated one; a lowest `language_score` in `thresholds` replaces all.
        """
        if "language_score" in self.thresholds and "min" in self.thresholds["language_score"].model_fields_set:
            return Languages(tuple(self.languages))
        usual, own = self.min_language_score, dict(self.language_scores)
        if self.languages and usual is None:
            usual, own = USUAL_LANGUAGE_SCORE, LANGUAGE_SCORES | own
        lowest = {name: score for name, score in own.items() if name in self.languages or not self.languages}
        return Languages(tuple(self.languages), usual, {name: score for name, score in lowest.items() if score != usual})


def _check_known(what: str, name: str, known: tuple[str, ...], *, user_functions: bool = True) -> None:
    if name in known or (user_functions and is_user_function(name)):
        return
    raise ValueError(f"unknown {what} {name!r}{nearest(name, list(known))}" if known else f"there is no {what} {name!r} yet")
