"""Settings of the stage `deduplicate`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from bessemer.core.config import setting
from bessemer.data.config.mixture import MixedConfig
from bessemer.data.config.stage import check_plugins
from bessemer.data.deduplication.config import KeepConfig, MinHashConfig, PassagesConfig, SemanticConfig
from bessemer.data.deduplication.registry import METHODS, OWN_METHODS


class DeduplicateConfig(MixedConfig):
    """Which documents count as the same, and which of them stays. A bare list is the list of methods."""

    shorthand: ClassVar[str | None] = "methods"

    methods: list[str] = setting(
        default_factory=lambda: ["exact"],
        description=f"in this order: {', '.join(plugin.name for plugin in OWN_METHODS)}",
        plugins=METHODS.group,
    )
    # what it holds enters the key
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
