"""Settings of the stage `select`: limits of scores, languages, licences, evaluation sets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.data.config.mixture import MixedConfig
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import FILTERS
from bessemer.data.plugins import Limit
from bessemer.data.thresholds.languages import (
    EVERY_LANGUAGE,
    LANGUAGE_SCORES,
    USUAL_LANGUAGE_SCORE,
    Languages,
    MeantFor,
)
from bessemer.data.thresholds.presets import OWN_PRESETS, by_language, is_preset, meant_for, preset, preset_names


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
            if not is_preset(name):
                raise ValueError(f"unknown preset {name!r}{nearest(name, preset_names())}")
        return value

    # what the files hold enters the key
    decontaminate: list[str] = setting(
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

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
        found = {column: meant_for(column) for column in self.limits() if column not in stated}
        found |= {column: MeantFor(only=tuple(names)) if names else EVERY_LANGUAGE for column, names in stated.items()}
        return {column: scope for column, scope in found.items() if scope}

    def limits_by_language(self) -> dict[str, dict[str, Limit]]:
        """By column the limits of the languages that have another. What `thresholds` states is for every language."""
        found: dict[str, dict[str, Limit]] = {}
        for column in self.limits():
            stated = self.thresholds.get(column)
            given = stated.model_fields_set if stated else set()
            for language, (lowest, highest) in by_language(column).items():
                low = stated.min if stated and "min" in given else lowest
                high = stated.max if stated and "max" in given else highest
                found.setdefault(column, {})[language] = (low, high)
        return found

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
