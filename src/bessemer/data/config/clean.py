"""Settings of the stage `clean`: edits and scores."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from bessemer.core.config import setting
from bessemer.core.usercode import is_user_function
from bessemer.data.config.stage import DataConfig, check_plugins
from bessemer.data.edits.config import Boilerplate, C4Lines, PersonalData, Repair, Secrets
from bessemer.data.edits.registry import EDITS, OWN_EDITS, edit_plugin
from bessemer.data.filters.registry import FILTERS, OWN_FILTERS

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
