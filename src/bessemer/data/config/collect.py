"""Settings of the stage `collect`: sources, parts, and what is held out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import field_validator

from bessemer.core.config import ChosenSettings, setting
from bessemer.data.config.stage import DataConfig, check_plugins
from bessemer.data.sources.config import PythonDocsSource, SourceSettings, WheelsSource
from bessemer.data.sources.registry import SOURCES, USER_SOURCE, source_plugin


def _settings_of(name: str) -> tuple[str, type[SourceSettings]]:
    """The tag and the settings of a source's name, or of the tag of a user's function."""
    plugin = USER_SOURCE if name == USER_SOURCE.name else source_plugin(name)
    assert plugin.settings is not None and issubclass(plugin.settings, SourceSettings), "source_plugin sees to it"
    return plugin.name, plugin.settings


#: The settings of one source: the class that its plugin names.
Source: TypeAlias = Annotated[SourceSettings, ChosenSettings("source", _settings_of)]


def source_name(source: SourceSettings) -> str:
    """The name under which a source's documents are kept and from which their ids are made."""
    stated: str | None = getattr(source, "name", None)
    return stated or source.source.rpartition(":")[2]


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
