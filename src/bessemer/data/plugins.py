"""Plugins of the data stages: what a package declares to add a source, a filter, an edit or a deduplication method.

A score column may have a limit, and a limit the languages that it is meant for. Declarations are plain Python: a recipe is
checked against them without importing the code that they name. A filter in a package of its own:

    PLUGIN = FilterPlugin("shouting", "share of capitals", "my_package.shouting:shouting",
        columns={"shouting": Column("share of the letters that are capitals", limit=(None, 0.5))})

and in its `pyproject.toml`:

    [project.entry-points."bessemer.filters"]
    shouting = "my_package.shouting_plugin:PLUGIN"
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from bessemer.core.registry import Plugin

if TYPE_CHECKING:
    import pyarrow as pa

    from bessemer.core.progress import Progress
    from bessemer.data.deduplication.corpus import Corpus
    from bessemer.data.deduplication.removals import Removals
    from bessemer.data.sources.source import Source


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


#: The type of a setting that is a list of strings, or one string for a list of one.
Strings: TypeAlias = Annotated[list[str], BeforeValidator(_as_list)]

#: Lowest and highest value that is kept, both inclusive; None is no limit.
Limit: TypeAlias = tuple[float | None, float | None]


@dataclass(frozen=True)
class Languages:
    """Which languages are kept, none named means every one, and the lowest probability at which a document is in its language.
    `lowest` holds the languages whose probability is another than the `usual` one; None is no limit."""

    kept: tuple[str, ...] = ()
    usual: float | None = None
    lowest: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.lowest) or self.usual is not None


@dataclass(frozen=True)
class MeantFor:
    """The languages, as ISO 639 codes, for which a limit is meant: `only` some, or every one `but` some."""

    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is a language for which it is not meant."""
        return bool(self.only or self.but)

    def holds_for(self, languages: pa.Array) -> pa.Array:
        """Whether the limit is for each document, by language. It is for documents of unknown language."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self:
            return pa.repeat(pa.scalar(True), len(languages))
        named = pc.is_in(languages, pa.array(self.only or self.but, pa.string()))
        return pc.or_(pc.is_null(languages), named if self.only else pc.invert(named))


EVERY_LANGUAGE = MeantFor()

#: By language what FineWeb-2 publishes (Penedo et al. 2025; huggingface/fineweb-2, `configs/`, commit d0defb24), for the most
#: frequent script; and `fewest_words`, where the Universal Declaration of Human Rights has less than 0.8 of English's words, 50
#: times that share. The columns but for the first two are named after the scores.
_TABLE = Path(__file__).with_name("languages.csv")
#: FineWeb-2's tokenizers cut more words, of morphemes and compounds, than stand between spaces, so that the same marks are a
#: smaller share of theirs. With limits lower by this, translations of paragraphs that the English limit keeps are kept
#: (`benchmarks/languages.py`, the paragraphs that it does not judge by).
WORDS_WITH_LETTER_SLACK = 0.06


def limits_by_language(
    limit: Limit, lowest: str | None = None, highest: str | None = None, slack: float = 0
) -> dict[str, Limit]:
    """The limit of each language whose own, by the columns of the table, is wider than `limit`, which is English's. A narrower
    one is not taken: it was found on other words than ours. slack: how much lower the lowest value is."""
    limits: dict[str, Limit] = {}
    for language, row in _table().items():
        low, high = limit
        if lowest in row and low is not None:
            low = min(low, round(row[lowest] - slack, 3))
        if highest in row and high is not None:
            high = max(high, row[highest])
        if (low, high) != limit:
            limits[language] = (low, high)
    return limits


@cache
def _table() -> dict[str, dict[str, float]]:
    with _TABLE.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {row["language"]: {name: float(row[name]) for name in list(row)[2:] if row[name]} for row in rows}


#: Languages written without spaces between words, so that a "word" is a clause: Chinese with Wu and Cantonese, Japanese, Thai,
#: Lao, Khmer, Burmese, Tibetan, Dzongkha.
WITHOUT_SPACES = ("zh", "wuu", "yue", "ja", "th", "lo", "km", "my", "bo", "dz")
#: Of these, those that do not end a sentence with a mark.
WITHOUT_FULL_STOPS = ("th", "lo", "bo", "dz")

#: Lowest probability of the language to keep a text in it.
USUAL_LANGUAGE_SCORE = 0.65
#: Lowest probabilities of languages for which the usual one is far off: the model is never sure of them, or takes others
#: for them. Measured on Django's translations (docs/scores.md).
_BY_SCORE = {
    0.35: "af ast br ca cy et eu ga gd gl ia is kk ky mn ne nn sk sw tg tk",
    0.4: "uz",
    0.45: "sl",
    0.7: "sr",
    0.75: "pl",
    0.8: "cs hi tr",
    0.85: "da eo es",
    0.9: "nl ru vi",
}
LANGUAGE_SCORES = dict(sorted((language, score) for score, names in _BY_SCORE.items() for language in names.split()))


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
    keeps. languages: those for which the limit is meant. by_language: the limits of languages that have another. value: from
    what the filter's function counts in a batch to the column; None where the function gives the columns themselves.
    """

    description: str
    type: ColumnType = "float64"
    limit: Limit = NO_LIMIT
    languages: MeantFor = EVERY_LANGUAGE
    by_language: Mapping[str, Limit] = field(default_factory=dict)
    value: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class FilterPlugin(Plugin[FilterFunction]):
    """A filter: a function from `Texts` to score columns, named in `clean.score`.

    columns: by name, in the order in which limits are applied; each begins with the filter's name. reads: the documents'
    column that the function is given; a missing value is the empty string. A filter with a limit is a preset of `select.keep`.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    reads: str = "text"

    def load(self) -> FilterFunction:
        """The function from texts to score columns. Raises ImportError when it needs a package that is not installed."""
        function = super().load()
        values = {name: column.value for name, column in self.columns.items() if column.value is not None}
        if not values:
            return function
        types = arrow_types(self.columns)

        def scores(texts: Any, **settings: Any) -> dict[str, pa.Array]:
            import pyarrow as pa

            counted = function(texts, **settings)
            return {name: pa.array(value(counted), types[name]) for name, value in values.items()}

        return scores

    def __call__(self, texts: Any) -> Mapping[str, pa.Array]:
        """The score columns of a batch of texts, with the usual settings."""
        return self.load()(texts, **({"settings": self.settings()} if self.settings else {}))


@dataclass(frozen=True)
class EditPlugin(Plugin[EditFunction]):
    """An edit: a function from `Texts` to other texts and columns that count its changes, named in `clean.edit`. section: the
    section of `clean` that holds its settings; without one the function gets the settings' defaults."""

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
    """A deduplication method, named in `deduplicate.methods`. section: the section of `deduplicate` that holds its settings;
    without one the function gets the settings' defaults."""

    section: str | None = None


def arrow_types(columns: Mapping[str, Column]) -> dict[str, pa.DataType]:
    """The Arrow types of columns, by name."""
    import pyarrow as pa

    return {name: pa.type_for_alias(column.type) for name, column in columns.items()}


def limits_of(columns: Mapping[str, Column]) -> dict[str, Limit]:
    """The limits of the columns that have one."""
    return {name: column.limit for name, column in columns.items() if column.limit != NO_LIMIT}
