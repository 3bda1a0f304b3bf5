"""Filters: their columns, what they say, the limits by which they are known and their source; and the presets of `select`.

A preset is the named limits of a filter's or an edit's score columns. Pure Python: a recipe is checked without the filters'
code. The columns stand in the order in which the peers' rules are applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.edits.registry import EDITS, OWN_EDITS, edit_plugin
from bessemer.data.plugins import (
    EVERY_LANGUAGE,
    WITHOUT_FULL_STOPS,
    WITHOUT_SPACES,
    WORDS_WITH_LETTER_SLACK,
    Column,
    EditPlugin,
    FilterFunction,
    FilterPlugin,
    Limit,
    MeantFor,
    limits_by_language,
    limits_of,
)

# The limits were all found on English; `limits_by_language` are those of languages that need another. What counts marks, lines
# and characters means the same elsewhere; what counts words does not where words are written without spaces.
_BY_WORDS = MeantFor(but=WITHOUT_SPACES)

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
        # its limits are by language: `data/languages.csv`
        "language_score": Column("how probable that language is (0 to 1)"),
    },
)

_GOPHER_QUALITY = FilterPlugin(
    "gopher_quality",
    "Gopher's measures of quality (Rae et al. 2021, section A.1.1)",
    "bessemer.data.filters.heuristics:gopher_quality",
    columns={
        "gopher_words": Column(
            "words",
            limit=(50, 100_000),
            languages=_BY_WORDS,
            by_language=limits_by_language((50, 100_000), "fewest_words"),
        ),
        "gopher_mean_word_length": Column(
            "mean word length, in characters",
            limit=(3, 10),
            languages=_BY_WORDS,
            by_language=limits_by_language((3, 10), "shortest_words", "longest_words"),
        ),
        "gopher_hashes_per_word": Column("`#` per word", limit=(None, 0.1), languages=_BY_WORDS),
        "gopher_ellipses_per_word": Column("`…` or `...` per word", limit=(None, 0.1), languages=_BY_WORDS),
        "gopher_bullet_lines": Column("share of lines that begin with a bullet", limit=(None, 0.9)),
        "gopher_ellipsis_lines": Column("share of lines that end in an ellipsis", limit=(None, 0.3)),
        "gopher_words_with_letter": Column(
            "share of words with a letter",
            limit=(0.8, None),
            by_language=limits_by_language((0.8, None), "words_with_letter", slack=WORDS_WITH_LETTER_SLACK),
        ),
        "gopher_stop_words": Column(
            "how many of the, be, to, of, and, that, have, with occur", limit=(2, None), languages=MeantFor(only=("en",))
        ),
    },
)


def _top_gram(words: int, highest: float) -> Column:
    description = f"share of characters in the most frequent run of {words} words"
    return _n_grams(description, highest, f"top_{words}_gram")


def _duplicate_grams(words: int, highest: float) -> Column:
    description = f"share of characters in runs of {words} words that occurred before"
    return _n_grams(description, highest, f"duplicate_{words}_grams")


def _n_grams(description: str, highest: float, name: str) -> Column:
    limit: Limit = (None, highest)
    return Column(description, limit=limit, languages=_BY_WORDS, by_language=limits_by_language(limit, highest=name))


_GOPHER_REPETITION = FilterPlugin(
    "gopher_repetition",
    "Gopher's measures of repetition (Rae et al. 2021, table A1)",
    "bessemer.data.filters.heuristics:gopher_repetition",
    columns={
        "gopher_repetition_duplicate_paragraphs": Column("share of paragraphs equal to an earlier one", limit=(None, 0.30)),
        "gopher_repetition_duplicate_paragraph_characters": Column(
            "share of characters in such paragraphs", limit=(None, 0.20)
        ),
        "gopher_repetition_duplicate_lines": Column(
            "share of lines equal to an earlier one",
            limit=(None, 0.30),
            by_language=limits_by_language((None, 0.30), highest="duplicate_lines"),
        ),
        "gopher_repetition_duplicate_line_characters": Column("share of characters in such lines", limit=(None, 0.20)),
        "gopher_repetition_top_2_gram": _top_gram(2, 0.20),
        "gopher_repetition_top_3_gram": _top_gram(3, 0.18),
        "gopher_repetition_top_4_gram": _top_gram(4, 0.16),
        "gopher_repetition_duplicate_5_grams": _duplicate_grams(5, 0.15),
        "gopher_repetition_duplicate_6_grams": _duplicate_grams(6, 0.14),
        "gopher_repetition_duplicate_7_grams": _duplicate_grams(7, 0.13),
        "gopher_repetition_duplicate_8_grams": _duplicate_grams(8, 0.12),
        "gopher_repetition_duplicate_9_grams": _duplicate_grams(9, 0.11),
        "gopher_repetition_duplicate_10_grams": _duplicate_grams(10, 0.10),
    },
)

_C4 = FilterPlugin(
    "c4",
    "C4's rules about whole documents (Raffel et al. 2020, section 2.2), for texts that the edit `c4_lines` left",
    "bessemer.data.filters.heuristics:c4",
    columns={
        "c4_lorem_ipsum": Column("occurrences of “lorem ipsum”", limit=(None, 0)),
        "c4_curly_brackets": Column("occurrences of `{`", limit=(None, 0)),
        # a full stop ends a sentence where a space or a line's end is behind it
        "c4_sentences": Column("sentences", limit=(5, None), languages=_BY_WORDS),
    },
)

_FINEWEB = FilterPlugin(
    "fineweb",
    "FineWeb's own measures (Penedo et al. 2024, section 3.5)",
    "bessemer.data.filters.heuristics:fineweb",
    columns={
        "fineweb_punctuated_lines": Column(
            "share of lines that end like a sentence",
            limit=(0.12, None),
            languages=MeantFor(but=WITHOUT_FULL_STOPS),
            by_language=limits_by_language((0.12, None), "punctuated_lines"),
        ),
        # thirty characters of these languages say as much as a hundred of others
        "fineweb_short_lines": Column(
            "share of lines of at most 30 characters",
            limit=(None, 0.67),
            languages=MeantFor(but=("zh", "wuu", "yue", "ja", "ko")),
        ),
        "fineweb_duplicate_line_characters": Column("share of characters in lines equal to an earlier one", limit=(None, 0.01)),
        "fineweb_newlines_per_word": Column(
            "line breaks per word",
            limit=(None, 0.3),
            languages=_BY_WORDS,
            by_language=limits_by_language((None, 0.3), highest="newlines_per_word"),
        ),
    },
)

_CODE = FilterPlugin(
    "code",
    "measures of source code (Chen et al. 2021, section 3.1; Li et al. 2023, section 4; Lozhkov et al. 2024, section 4)",
    "bessemer.data.filters.code:code",
    columns={
        "code_longest_line": Column("characters of the longest line", limit=(None, 1000)),
        "code_mean_line": Column("characters of a line on average", limit=(None, 100)),
        "code_alphanumeric": Column("share of characters that are letters or digits", limit=(0.25, None)),
        "code_letters": Column("share of characters that are letters", limit=(0.25, None)),
        "code_encoded": Column("share of bytes that are encoded data: base64, rows of numbers", limit=(None, 0.5)),
        "code_generated": Column("1 where the first lines say that a program wrote it", limit=(None, 0)),
        "code_xml_header": Column("1 where it begins as XML does", limit=(None, 0)),
        "code_minified": Column("1 for long lines with hardly any white space", limit=(None, 0)),
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
    _GOPHER_QUALITY,
    _GOPHER_REPETITION,
    _C4,
    _FINEWEB,
    _CODE,
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
    """What the filter or edit that adds a column declares of it; None for a column of the user's own.

    Of other packages those filters and edits are asked with whose name the column begins.
    """
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
    """What a column says; an empty string for one that no filter or edit declares, as a user's own."""
    if column.startswith("language_score_"):
        # the documents of one language, which has a limit of its own
        return f"{column_description('language_score')}, of those in {column.rpartition('_')[2]}"
    declared = declared_column(column)
    return "" if declared is None else declared.description
