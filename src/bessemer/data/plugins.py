"""Plugins of the data stages: what another package declares to add a source, a filter, an edit or a deduplication method.

Declarations are plain Python: a recipe is checked against them, and limits and descriptions of columns are read from them,
without importing the code that they name. A filter in a package of its own:

    PLUGIN = FilterPlugin(
        "shouting",
        "share of capitals",
        "my_package.shouting:shouting",
        columns={"shouting": Column("share of the letters that are capitals", limit=(None, 0.5))},
    )

and in its `pyproject.toml`:

    [project.entry-points."bessemer.filters"]
    shouting = "my_package.shouting_plugin:PLUGIN"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bessemer.core.registry import Plugin
from bessemer.data.thresholds.languages import EVERY_LANGUAGE, MeantFor
from bessemer.data.thresholds.languages import Limit as Limit

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from bessemer.core.progress import Progress
    from bessemer.data.deduplication.corpus import Corpus
    from bessemer.data.deduplication.removals import Removals
    from bessemer.data.sources.source import Source

NO_LIMIT: Limit = (None, None)

#: Names of Arrow types.
ColumnType: TypeAlias = Literal["float64", "int64", "bool", "string"]

# From a batch of texts to its score columns; `settings=` is given where the plugin has some.
FilterFunction: TypeAlias = "Callable[..., Mapping[str, pa.Array]]"
# From a batch of texts, and `settings=` where the plugin has some, to the edited texts and columns of counts.
EditFunction: TypeAlias = "Callable[..., tuple[pa.Array, Mapping[str, pa.Array]]]"
# From the settings, the folder of relative paths and the cache to a source.
SourceOpener: TypeAlias = "Callable[[Any, Path, Path], Source]"
# From the corpus, a scratch folder, the settings and the folder of relative paths to removals and their summary.
MethodFunction: TypeAlias = "Callable[[Corpus, Path, Any, Path], tuple[Removals, dict[str, Any]]]"


@dataclass(frozen=True)
class Column:
    """A column that a filter or an edit adds to the documents.

    description: what a value says, in a line. type: of the values. limit: the range that the preset of the filter's name
    keeps. languages: those for which the limit is meant. by_language: the limits of languages that have another.
    """

    description: str
    type: ColumnType = "float64"
    limit: Limit = NO_LIMIT
    languages: MeantFor = EVERY_LANGUAGE
    by_language: Mapping[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True)
class FilterPlugin(Plugin[FilterFunction]):
    """A filter: a function from `Texts` to score columns, named in `clean.score`.

    columns: by name, in the order in which limits are applied; each begins with the filter's name. reads: the documents'
    column that the function is given; a missing value is the empty string. A filter with a limit is a preset of `select.keep`.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    reads: str = "text"


@dataclass(frozen=True)
class EditPlugin(Plugin[EditFunction]):
    """An edit: a function from `Texts` to other texts and columns that count its changes, named in `clean.edit`.

    section: the section of `clean` that holds its settings; without one the function gets the settings' defaults.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    section: str | None = None


@dataclass(frozen=True)
class SourcePlugin(Plugin[SourceOpener]):
    """A source: a function that opens one, named by the key `source` of an item of `collect.sources`.

    settings: a `SourceSettings` whose field `source` is the literal name. fingerprint: `module:function` that replaces the
    opened source's own `fingerprint`, called with the settings, the folder, the cache, whether it may fetch, and progress.
    """

    fingerprint: str | None = None

    def load_fingerprint(self) -> Callable[[Any, Path, Path, bool, Progress | None], Any] | None:
        """The function that `fingerprint` names; None without one."""
        if self.fingerprint is None:
            return None
        plugin: Plugin[Callable[[Any, Path, Path, bool, Progress | None], Any]]
        plugin = Plugin(self.name, self.description, self.fingerprint)
        return plugin.load()


@dataclass(frozen=True)
class MethodPlugin(Plugin[MethodFunction]):
    """A deduplication method, named in `deduplicate.methods`.

    section: the section of `deduplicate` that holds its settings; without one the function gets the settings' defaults.
    """

    section: str | None = None


def arrow_types(columns: Mapping[str, Column]) -> dict[str, pa.DataType]:
    """The Arrow types of columns, by name."""
    import pyarrow as pa

    return {name: pa.type_for_alias(column.type) for name, column in columns.items()}


def limits_of(columns: Mapping[str, Column]) -> dict[str, Limit]:
    """The limits of the columns that have one."""
    return {name: column.limit for name, column in columns.items() if column.limit != NO_LIMIT}
