"""The usual limits of scores: lowest and highest that is kept, both inclusive, by column; None is no limit. And for which
languages each is meant.

Apart from the filters, so that a recipe is checked without loading what computes them. In the order in which the peers'
rules are asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bessemer.data.thresholds.presets import MeantFor

if TYPE_CHECKING:
    from bessemer.data.thresholds.presets import Limit

#: Rae et al. 2021, section A.1.1.
GOPHER_QUALITY: dict[str, Limit] = {
    "gopher_words": (50, 100_000),
    "gopher_mean_word_length": (3, 10),
    "gopher_hashes_per_word": (None, 0.1),
    "gopher_ellipses_per_word": (None, 0.1),
    "gopher_bullet_lines": (None, 0.9),
    "gopher_ellipsis_lines": (None, 0.3),
    "gopher_words_with_letter": (0.8, None),
    "gopher_stop_words": (2, None),
}

#: Rae et al. 2021, table A1.
GOPHER_REPETITION: dict[str, Limit] = {
    "gopher_repetition_duplicate_paragraphs": (None, 0.30),
    "gopher_repetition_duplicate_paragraph_characters": (None, 0.20),
    "gopher_repetition_duplicate_lines": (None, 0.30),
    "gopher_repetition_duplicate_line_characters": (None, 0.20),
    "gopher_repetition_top_2_gram": (None, 0.20),
    "gopher_repetition_top_3_gram": (None, 0.18),
    "gopher_repetition_top_4_gram": (None, 0.16),
    "gopher_repetition_duplicate_5_grams": (None, 0.15),
    "gopher_repetition_duplicate_6_grams": (None, 0.14),
    "gopher_repetition_duplicate_7_grams": (None, 0.13),
    "gopher_repetition_duplicate_8_grams": (None, 0.12),
    "gopher_repetition_duplicate_9_grams": (None, 0.11),
    "gopher_repetition_duplicate_10_grams": (None, 0.10),
}

#: Raffel et al. 2020, section 2.2, after `edits.c4_lines`.
C4: dict[str, Limit] = {
    "c4_lorem_ipsum": (None, 0),
    "c4_curly_brackets": (None, 0),
    "c4_sentences": (5, None),
}

#: Penedo et al. 2024, section 3.5.
FINEWEB: dict[str, Limit] = {
    "fineweb_punctuated_lines": (0.12, None),
    "fineweb_short_lines": (None, 0.67),
    "fineweb_duplicate_line_characters": (None, 0.01),
    "fineweb_newlines_per_word": (None, 0.3),
}

#: Chen et al. 2021, section 3.1; Li et al. 2023, section 4; Lozhkov et al. 2024, section 4.
CODE: dict[str, Limit] = {
    "code_longest_line": (None, 1000),
    "code_mean_line": (None, 100),
    "code_alphanumeric": (0.25, None),
    "code_letters": (0.25, None),
    "code_encoded": (None, 0.5),
    "code_generated": (None, 0),
    "code_xml_header": (None, 0),
    "code_minified": (None, 0),
}

#: Languages written without spaces between words, so that a "word" is a clause: Chinese with Wu and Cantonese, Japanese, Thai,
#: Lao, Khmer, Burmese, Tibetan, Dzongkha.
WITHOUT_SPACES = ("zh", "wuu", "yue", "ja", "th", "lo", "km", "my", "bo", "dz")
#: Of these, those that do not end a sentence with a mark.
WITHOUT_FULL_STOPS = ("th", "lo", "bo", "dz")

_BY_WORDS = MeantFor(but=WITHOUT_SPACES)

#: For which languages a limit is meant, by column; those that are not named here are for every language. All were found on
#: English; what counts marks, lines and characters means the same elsewhere.
MEANT_FOR: dict[str, MeantFor] = {
    **dict.fromkeys(
        (
            *("gopher_words", "gopher_mean_word_length", "gopher_hashes_per_word", "gopher_ellipses_per_word"),
            "gopher_words_with_letter",
            *(name for name in GOPHER_REPETITION if name.endswith(("_gram", "_grams"))),
            "fineweb_newlines_per_word",
            "c4_sentences",  # a full stop ends a sentence where a space or a line's end is behind it
        ),
        _BY_WORDS,
    ),
    "gopher_stop_words": MeantFor(only=("en",)),
    "fineweb_punctuated_lines": MeantFor(but=WITHOUT_FULL_STOPS),
    # thirty characters of these say as much as a hundred of others
    "fineweb_short_lines": MeantFor(but=("zh", "wuu", "yue", "ja", "ko")),
}
