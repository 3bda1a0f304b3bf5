"""Settings of the data stages: `collect`, `clean`, `deduplicate`, `select`, and what all of them have.

Nothing heavy is imported here, so that a recipe is checked without the libraries that read documents. The settings of sources,
edits and deduplication methods are with their declarations (`sources/registry.py`, `edits/registry.py`,
`deduplication/registry.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import field_validator, model_validator

from bessemer.core.config import ChosenSettings, Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.object_storage import ObjectPath
from bessemer.core.registry import Registry
from bessemer.core.usercode import is_user_function
from bessemer.data.deduplication.registry import METHODS, OWN_METHODS, KeepConfig, MinHashConfig, PassagesConfig, SemanticConfig
from bessemer.data.edits.registry import EDITS, OWN_EDITS, Boilerplate, C4Lines, PersonalData, Repair, Secrets, edit_plugin
from bessemer.data.engine import Engine
from bessemer.data.filters.registry import (
    FILTERS,
    OWN_FILTERS,
    OWN_PRESETS,
    by_language,
    is_preset,
    meant_for,
    preset,
    preset_names,
)
from bessemer.data.plugins import EVERY_LANGUAGE, LANGUAGE_SCORES, USUAL_LANGUAGE_SCORE, Languages, Limit, MeantFor, Strings
from bessemer.data.sources.registry import (
    SOURCES,
    USER_SOURCE,
    PythonDocsSource,
    SourceSettings,
    WheelsSource,
    source_name,
    source_plugin,
)


def check_plugins(registry: Registry[Any], names: list[str], *, user_functions: bool = True) -> list[str]:
    """The names, when a recipe may use each: a plugin's, or where allowed a `file.py:function`. Raises ValueError otherwise."""
    for name in names:
        if name not in registry and not (user_functions and is_user_function(name)):
            raise ValueError(f"unknown {registry.kind} {name!r}{nearest(name, list(registry))}")
    return names


class DataConfig(Config):
    """Where a data stage runs; none of it can change the output."""

    engine: Literal["local", "ray"] = setting(
        "local",
        "`local` (this machine's cores) or `ray` (a cluster, whose workers need Bessemer with the extra `data`)",
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


def _settings_of(name: str) -> tuple[str, type[SourceSettings]]:
    """The tag and the settings of a source's name, or of the tag of a user's function."""
    plugin = USER_SOURCE if name == USER_SOURCE.name else source_plugin(name)
    assert plugin.settings is not None and issubclass(plugin.settings, SourceSettings), "source_plugin sees to it"
    return plugin.name, plugin.settings


#: The settings of one source: the class that its plugin names.
Source: TypeAlias = Annotated[SourceSettings, ChosenSettings("source", _settings_of)]


class CollectConfig(DataConfig):
    """Where documents come from, and which of them are held out. A bare list is the list of sources."""

    shorthand: ClassVar[str | None] = "sources"

    sources: list[Source] = setting(..., "what is read, each with its `source`", min_length=1, plugins=SOURCES.group)
    buckets: int = setting(
        16, "parts that the documents lie in, a power of 2: about a gigabyte of text in each is well", ge=1, le=4096
    )
    validation_share: float = setting(
        0.05,
        "share of packages (of files, of records where there are none) held out for validation, chosen by hash",
        ge=0,
        le=0.5,
    )

    hold_out: Literal["groups", "documents"] = setting(
        "groups",
        "groups: a package or a file is held out whole, so that none is trained on in part; documents: single documents, for a "
        "few files, of which one would be too much",
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
                raise ValueError("each source needs a `source`: " + ", ".join(SOURCES) + " or file.py:function")
            check_plugins(SOURCES, [name])
        return sources

    @field_validator("sources")
    @classmethod
    def _different_names(cls, value: list[Source]) -> list[Source]:
        names = [source_name(source) for source in value if not isinstance(source, (WheelsSource, PythonDocsSource))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}, and ids are made from names; give one another `name`")
        return value


_OWN_EDITS = [plugin.name for plugin in OWN_EDITS]
#: The settings of edits, by the section that holds them.
_SECTIONS = {plugin.section: plugin.settings for plugin in OWN_EDITS if plugin.section and plugin.settings}


class CleanConfig(DataConfig):
    """How documents are edited and scored. Nothing is dropped here: `select` applies thresholds to the scores."""

    edit: list[str] = setting(
        default_factory=list,
        description=f"edits of the text, in this order: {', '.join(_OWN_EDITS)}, pii (the last two) or file.py:function",
        code=True,
        plugins=EDITS.group,
    )
    score: list[str] = setting(
        default_factory=lambda: ["language", "gopher_quality", "gopher_repetition"],
        description=f"scores to compute: {', '.join(plugin.name for plugin in OWN_FILTERS)} or file.py:function",
        code=True,
        plugins=FILTERS.group,
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
        return check_plugins(EDITS, value)

    @field_validator("score")
    @classmethod
    def _known_scorers(cls, value: list[str]) -> list[str]:
        return check_plugins(FILTERS, value)

    @model_validator(mode="after")
    def _settings_of_edits_that_are_named(self) -> CleanConfig:
        named = {edit_plugin(name).section for name in self.edit if not is_user_function(name)}
        for section, settings in _SECTIONS.items():
            if section not in named and getattr(self, section) != settings():
                raise ValueError(f"{section}: these are settings of an edit that `edit` does not name")
        return self


class DeduplicateConfig(MixedConfig):
    """Which documents count as the same, and which of them stays. A bare list is the list of methods."""

    shorthand: ClassVar[str | None] = "methods"

    methods: list[str] = setting(
        default_factory=lambda: ["exact"],
        description=f"in this order: {', '.join(plugin.name for plugin in OWN_METHODS)}",
        plugins=METHODS.group,
    )
    # affects_output is False because the key holds the folder's content instead of its path
    against: str | None = setting(
        None,
        "a folder of documents, or a run's `corpus`: what is a copy of something in there is dropped as well",
        affects_output=False,
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
        check_plugins(METHODS, value, user_functions=False)
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

    keep: Strings = setting(
        default_factory=lambda: ["gopher"], description=f"presets of thresholds, all of which hold: {', '.join(OWN_PRESETS)}"
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

    # the file's content enters the stage's key
    policy: str | None = setting(
        None,
        "YAML file of a policy: documents of the categories that its surface `training` refuses are dropped, by their scores "
        "`hazards_…` and the policy's limits; `thresholds` replaces these",
        affects_output=False,
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

    @field_validator("keep")
    @classmethod
    def _known_presets(cls, value: list[str]) -> list[str]:
        for name in value:
            if not is_preset(name):
                raise ValueError(f"unknown preset {name!r}{nearest(name, preset_names())}")
        return value

    # the files' content enters the stage's key
    decontaminate: Strings = setting(
        default_factory=list,
        description="evaluation sets, as JSONL files: documents that hold a piece of an item are dropped",
        affects_output=False,
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

    def plugins(self) -> list[tuple[str, str]]:
        """Also the plugins of other packages whose limits `keep` names."""
        registries = (FILTERS, EDITS)
        named = {(one.group, name) for name in self.keep if name not in OWN_PRESETS for one in registries if name in one}
        return sorted({*super().plugins(), *named})

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
        scopes = {column: meant_for(column) for column in self.limits() if column not in stated}
        scopes |= {column: MeantFor(only=tuple(names)) if names else EVERY_LANGUAGE for column, names in stated.items()}
        return {column: scope for column, scope in scopes.items() if scope}

    def limits_by_language(self) -> dict[str, dict[str, Limit]]:
        """By column the limits of the languages that have another. What `thresholds` states is for every language."""
        limits: dict[str, dict[str, Limit]] = {}
        for column in self.limits():
            stated = self.thresholds.get(column)
            given = stated.model_fields_set if stated else set()
            for language, (lowest, highest) in by_language(column).items():
                low = stated.min if stated and "min" in given else lowest
                high = stated.max if stated and "max" in given else highest
                limits.setdefault(column, {})[language] = (low, high)
        return limits

    def language_limits(self) -> Languages:
        """The languages kept with their lowest probabilities: stated for one, stated for all, or the language's own. Where
        every language is kept there is no limit but a stated one; a lowest `language_score` in `thresholds` replaces all."""
        if "language_score" in self.thresholds and "min" in self.thresholds["language_score"].model_fields_set:
            return Languages(tuple(self.languages))
        usual, own = self.min_language_score, dict(self.language_scores)
        if self.languages and usual is None:
            usual, own = USUAL_LANGUAGE_SCORE, LANGUAGE_SCORES | own
        lowest = {name: score for name, score in own.items() if name in self.languages or not self.languages}
        return Languages(tuple(self.languages), usual, {name: score for name, score in lowest.items() if score != usual})


#: Each is raised whenever its stage writes other bytes for the same input (golden outputs in the tests).
COLLECT_VERSION = 5
CLEAN_VERSION = 4
DEDUPLICATE_VERSION = 4
SELECT_VERSION = 5
