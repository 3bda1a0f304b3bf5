"""Filters by name: those of rules (`rules.py`), of lists and of models; and the presets of `select`.

A preset is the named limits of a filter's or an edit's score columns. Pure Python: a recipe is checked without the filters'
code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.edits.registry import EDITS, OWN_EDITS, edit_plugin
from bessemer.data.filters.rules import c4, code, fineweb, gopher_quality, gopher_repetition
from bessemer.data.plugins import EVERY_LANGUAGE, Column, EditPlugin, FilterFunction, FilterPlugin, Limit, MeantFor, limits_of

#: MLCommons' hazard categories by our names: their numbers, and what each is about.
HAZARD_CATEGORIES = {
    "violent_crimes": ("S1", "help with or praise of violence"),
    "non_violent_crimes": ("S2", "help with theft, fraud, drugs, intrusion"),
    "sex_crimes": ("S3", "help with or praise of sexual violence"),
    "child_exploitation": ("S4", "sexual abuse of children"),
    "defamation": ("S5", "invented, damaging claims about real people"),
    "specialized_advice": ("S6", "dangerous medical, legal or financial advice"),
    "privacy": ("S7", "finding or exposing private information"),
    "intellectual_property": ("S8", "help with piracy"),
    "indiscriminate_weapons": ("S9", "weapons of mass destruction"),
    "hate": ("S10", "hatred of people for what they are"),
    "self_harm": ("S11", "suicide, self-harm, eating disorders"),
    "sexual_content": ("S12", "sexually explicit text"),
    "elections": ("S13", "false information on how to vote"),
    "code_interpreter_abuse": ("S14", "code that attacks the machine that runs it"),
}

_LANGUAGE = FilterPlugin(
    "language",
    "the language, by a small fastText model",
    "bessemer.data.filters.language:language",
    columns={
        "language": Column("the most probable language (ISO 639)", "string"),
        # each language has limits of its own, in `data/languages.csv`
        "language_score": Column("how probable that language is (0 to 1)"),
    },
)

_SPAM = FilterPlugin(
    "spam",
    "advertising, lures and text for search engines, by phrases and form",
    "bessemer.data.filters.word_list_scores:spam",
    columns={
        "spam_score": Column(
            "how probably the text is advertising, a lure or made for search engines (0 to 1)", limit=(None, 0.5)
        )
    },
)

_TOXICITY = FilterPlugin(
    "toxicity",
    "text that attacks people, and sexually explicit text, by words and phrases",
    "bessemer.data.filters.word_list_scores:toxicity",
    columns={
        "toxicity_score": Column(
            "how much the text attacks people: insults, slurs, slander of groups, threats, swearing (0 to 1)",
            limit=(None, 0.5),
        ),
        "toxicity_nsfw": Column("how sexually explicit the text is (0 to 1)", limit=(None, 0.5)),
    },
)

_MODEL_WRITTEN = FilterPlugin(
    "model_written",
    "text that a language model wrote, or that reads like one gone wrong",
    "bessemer.data.filters.word_list_scores:model_written",
    columns={
        "model_written_score": Column(
            "how strongly the text bears the marks of a language model's output (0 to 1)", limit=(None, 0.5)
        ),
        "model_written_phrases": Column(
            "tell-tale phrases: what models say of themselves, assistants' openings, favourite turns (0 to 1)"
        ),
        "model_written_repetition": Column("share of words in five-word sequences that occurred before in the text"),
        "model_written_monotony": Column("how much less variety the words have than usual at this length (0 to 1)"),
    },
)

_HAZARDS = FilterPlugin(
    "hazards",
    "MLCommons' hazard categories S1 to S14, by words and patterns",
    "bessemer.data.filters.word_list_scores:hazards",
    columns={
        f"hazards_{name}": Column(f"{number}: {about} (0 to 1)", limit=(None, 0.6))
        for name, (number, about) in HAZARD_CATEGORIES.items()
    },
)

_URLS = FilterPlugin(
    "urls",
    "addresses on lists of domains, or with words that say what the page will be",
    "bessemer.data.filters.urls:urls",
    columns={
        "urls_score": Column(
            "1 for an address on a list or with a word that alone decides, 0.5 with one doubtful word, else 0",
            limit=(None, 0.9),
        ),
        "urls_category": Column("the category of the list or of the words that decided; empty where there are none", "string"),
    },
    reads="url",
)

OWN_FILTERS = (
    _LANGUAGE,
    gopher_quality,
    gopher_repetition,
    c4,
    fineweb,
    code,
    _SPAM,
    _TOXICITY,
    _MODEL_WRITTEN,
    _HAZARDS,
    _URLS,
)
FILTERS: Registry[FilterFunction] = Registry("score", "bessemer.filters", OWN_FILTERS)

#: Columns of the setting `clean.perplexity`, which takes a model and so is no filter of a name.
PERPLEXITY = {
    "perplexity_bits_per_byte": Column("how surprising the text is to a language model, in bits per byte (0 for an empty text)")
}


def filter_plugin(name: str) -> FilterPlugin:
    """The declaration of a filter, ours or another package's. Raises ConfigError when there is none."""
    plugin = FILTERS.find(name)
    if not isinstance(plugin, FilterPlugin):
        raise ConfigError(f"the entry point {name!r} of {FILTERS.group} is not a FilterPlugin")
    return plugin


#: Presets of several filters or of none; every other preset is the filter or edit of its name.
COMBINED: dict[str, tuple[str, ...]] = {"all": (), "gopher": ("gopher_repetition", "gopher_quality")}
#: The presets of Bessemer's own filters and edits.
OWN_PRESETS = (*COMBINED, *(plugin.name for plugin in (*OWN_FILTERS, *OWN_EDITS) if limits_of(plugin.columns)))

_OWN = {plugin.name for plugin in (*OWN_FILTERS, *OWN_EDITS)}
_OWN_COLUMNS = {name: column for plugin in (*OWN_FILTERS, *OWN_EDITS) for name, column in plugin.columns.items()} | PERPLEXITY


def preset_names() -> list[str]:
    """Every preset, then the filters and edits of other packages, of which those with limits are presets. None is loaded."""
    return [*OWN_PRESETS, *(name for names in (FILTERS, EDITS) for name in names if name not in _OWN)]


def is_preset(name: str) -> bool:
    """Whether there is a preset of this name."""
    return name in OWN_PRESETS or any(plugin.name == name and limits_of(plugin.columns) for plugin in _of_others(name))


def scores_of(name: str) -> tuple[str, ...]:
    """The scores that a preset needs, by their names in a recipe."""
    return COMBINED.get(name, (name,))


def preset(name: str) -> dict[str, Limit]:
    """The limits of a preset, by column. Raises ConfigError for a name that is none."""
    limits: dict[str, Limit] = {}
    for score in scores_of(name):
        limits |= limits_of((filter_plugin(score) if score in FILTERS else edit_plugin(score)).columns)
    return limits


def meant_for(column: str) -> MeantFor:
    """The languages for which a column's usual limit is meant; every one where its filter declares none."""
    declared = declared_column(column)
    return EVERY_LANGUAGE if declared is None else declared.languages


def by_language(column: str) -> Mapping[str, Limit]:
    """The usual limits of the languages that have another than the column's, as its filter declares them."""
    declared = declared_column(column)
    return {} if declared is None else declared.by_language


def declared_column(name: str) -> Column | None:
    """What the filter or edit that adds a column declares of it; None for a column of the user's own. Of other packages those
    filters and edits are asked with whose name the column begins."""
    if name in _OWN_COLUMNS:
        return _OWN_COLUMNS[name]
    return next((plugin.columns[name] for plugin in _of_others(name) if name in plugin.columns), None)


def _of_others(column: str) -> Iterator[FilterPlugin | EditPlugin]:
    """The filters and edits of other packages with whose name a column begins."""
    for name in FILTERS:
        if name not in _OWN and (column == name or column.startswith(f"{name}_")):
            yield filter_plugin(name)
    for name in EDITS:
        if name not in _OWN and (column == name or column.startswith(f"{name}_")):
            yield edit_plugin(name)


def column_description(column: str) -> str:
    """A column's description; an empty string for one that no filter or edit declares, such as a user's own."""
    if column.startswith("language_score_"):
        # the documents of one language, which has a limit of its own
        return f"{column_description('language_score')}, of those in {column.rpartition('_')[2]}"
    declared = declared_column(column)
    return "" if declared is None else declared.description
