"""Rules of Gopher, C4 and FineWeb, and rules for source code: each a column with its formula, meaning, limit and languages.

The formula takes what `measures.py` or `code.py` counts in a batch, whose loops are compiled and imported with the first call.
Columns stand in the order in which the peers apply their rules. Ratios are zero in a text without words.

The limits were all found on English; `limits_by_language` are those of languages that need another. What counts marks, lines
and characters means the same elsewhere; what counts words does not where words are written without spaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bessemer.data.plugins import (
    WITHOUT_FULL_STOPS,
    WITHOUT_SPACES,
    WORDS_WITH_LETTER_SLACK,
    Column,
    FilterPlugin,
    Limit,
    MeantFor,
    limits_by_language,
)

if TYPE_CHECKING:
    import numpy as np

_BY_WORDS = MeantFor(but=WITHOUT_SPACES)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, float64, and zero where `whole` is."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)


gopher_quality = FilterPlugin(
    "gopher_quality",
    "Gopher's measures of quality (Rae et al. 2021, section A.1.1)",
    "bessemer.data.filters.measures:measure_quality",
    columns={
        "gopher_words": Column(
            "words",
            limit=(50, 100_000),
            languages=_BY_WORDS,
            by_language=limits_by_language((50, 100_000), "fewest_words"),
            value=lambda counted: counted.words,
        ),
        "gopher_mean_word_length": Column(
            "mean word length, in characters",
            limit=(3, 10),
            languages=_BY_WORDS,
            by_language=limits_by_language((3, 10), "shortest_words", "longest_words"),
            value=lambda counted: ratio(counted.characters, counted.words),
        ),
        "gopher_hashes_per_word": Column(
            "`#` per word",
            limit=(None, 0.1),
            languages=_BY_WORDS,
            value=lambda counted: ratio(counted.hashes, counted.words_and_marks),
        ),
        "gopher_ellipses_per_word": Column(
            "`…` or `...` per word",
            limit=(None, 0.1),
            languages=_BY_WORDS,
            value=lambda counted: ratio(counted.ellipses, counted.words_and_marks),
        ),
        "gopher_bullet_lines": Column(
            "share of lines that begin with a bullet",
            limit=(None, 0.9),
            value=lambda counted: ratio(counted.bullet_lines, counted.lines),
        ),
        "gopher_ellipsis_lines": Column(
            "share of lines that end in an ellipsis",
            limit=(None, 0.3),
            value=lambda counted: ratio(counted.ellipsis_lines, counted.lines),
        ),
        "gopher_words_with_letter": Column(
            "share of words with a letter",
            limit=(0.8, None),
            by_language=limits_by_language((0.8, None), "words_with_letter", slack=WORDS_WITH_LETTER_SLACK),
            value=lambda counted: ratio(
                counted.with_letter + counted.unspaced_words, counted.words_and_marks + counted.unspaced_words
            ),
        ),
        "gopher_stop_words": Column(
            f"how many of {', '.join(STOP_WORDS)} occur",
            limit=(2, None),
            languages=MeantFor(only=("en",)),
            value=lambda counted: counted.stop_words,
        ),
    },
)


def _top_gram(words: int, highest: float) -> Column:
    description = f"share of characters in the most frequent run of {words} words"
    return _n_grams(description, highest, f"top_{words}_gram", words)


def _duplicate_grams(words: int, highest: float) -> Column:
    description = f"share of characters in runs of {words} words that occurred before"
    return _n_grams(description, highest, f"duplicate_{words}_grams", words)


def _n_grams(description: str, highest: float, name: str, words: int) -> Column:
    limit: Limit = (None, highest)
    own = limits_by_language(limit, highest=name)
    return Column(
        description,
        limit=limit,
        languages=_BY_WORDS,
        by_language=own,
        value=lambda counted: ratio(counted.n_grams[:, words], counted.characters),
    )


gopher_repetition = FilterPlugin(
    "gopher_repetition",
    "Gopher's measures of repetition (Rae et al. 2021, table A1)",
    "bessemer.data.filters.measures:measure_repetition",
    columns={
        "gopher_repetition_duplicate_paragraphs": Column(
            "share of paragraphs equal to an earlier one",
            limit=(None, 0.30),
            value=lambda counted: ratio(counted.same_paragraphs, counted.paragraphs),
        ),
        "gopher_repetition_duplicate_paragraph_characters": Column(
            "share of characters in such paragraphs",
            limit=(None, 0.20),
            value=lambda counted: ratio(counted.paragraph_characters, counted.characters),
        ),
        "gopher_repetition_duplicate_lines": Column(
            "share of lines equal to an earlier one",
            limit=(None, 0.30),
            by_language=limits_by_language((None, 0.30), highest="duplicate_lines"),
            value=lambda counted: ratio(counted.same_lines, counted.lines),
        ),
        "gopher_repetition_duplicate_line_characters": Column(
            "share of characters in such lines",
            limit=(None, 0.20),
            value=lambda counted: ratio(counted.line_characters, counted.characters),
        ),
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

c4 = FilterPlugin(
    "c4",
    "C4's rules about whole documents (Raffel et al. 2020, section 2.2), for texts that the edit `c4_lines` left",
    "bessemer.data.filters.measures:measure_c4",
    columns={
        "c4_lorem_ipsum": Column("occurrences of “lorem ipsum”", limit=(None, 0), value=lambda counted: counted.lorem_ipsum),
        "c4_curly_brackets": Column("occurrences of `{`", limit=(None, 0), value=lambda counted: counted.curly_brackets),
        # a full stop ends a sentence where a space or a line's end is behind it
        "c4_sentences": Column("sentences", limit=(5, None), languages=_BY_WORDS, value=lambda counted: counted.sentences),
    },
)

fineweb = FilterPlugin(
    "fineweb",
    "FineWeb's own measures (Penedo et al. 2024, section 3.5)",
    "bessemer.data.filters.measures:measure_fineweb",
    columns={
        "fineweb_punctuated_lines": Column(
            "share of lines that end like a sentence",
            limit=(0.12, None),
            languages=MeantFor(but=WITHOUT_FULL_STOPS),
            by_language=limits_by_language((0.12, None), "punctuated_lines"),
            value=lambda counted: ratio(counted.punctuated_lines, counted.lines),
        ),
        # thirty characters of these languages say as much as a hundred of others
        "fineweb_short_lines": Column(
            "share of lines of at most 30 characters",
            limit=(None, 0.67),
            languages=MeantFor(but=("zh", "wuu", "yue", "ja", "ko")),
            value=lambda counted: ratio(counted.short_lines, counted.lines),
        ),
        "fineweb_duplicate_line_characters": Column(
            "share of characters in lines equal to an earlier one",
            limit=(None, 0.01),
            value=lambda counted: ratio(counted.same_characters, counted.characters),
        ),
        "fineweb_newlines_per_word": Column(
            "line breaks per word",
            limit=(None, 0.3),
            languages=_BY_WORDS,
            by_language=limits_by_language((None, 0.3), highest="newlines_per_word"),
            value=lambda counted: ratio(counted.newlines, counted.words_and_marks),
        ),
    },
)

code = FilterPlugin(
    "code",
    "measures of source code (Chen et al. 2021, section 3.1; Li et al. 2023, section 4; Lozhkov et al. 2024, section 4)",
    "bessemer.data.filters.code:measure_code",
    columns={
        "code_longest_line": Column(
            "characters of the longest line", limit=(None, 1000), value=lambda counted: counted.longest_line
        ),
        "code_mean_line": Column("characters of a line on average", limit=(None, 100), value=lambda counted: counted.mean_line),
        "code_alphanumeric": Column(
            "share of characters that are letters or digits",
            limit=(0.25, None),
            value=lambda counted: ratio(counted.alphanumeric, counted.characters),
        ),
        "code_letters": Column(
            "share of characters that are letters",
            limit=(0.25, None),
            value=lambda counted: ratio(counted.letters, counted.characters),
        ),
        "code_encoded": Column(
            "share of bytes that are encoded data: base64, rows of numbers",
            limit=(None, 0.5),
            value=lambda counted: ratio(counted.encoded_bytes, counted.bytes),
        ),
        "code_generated": Column(
            "1 where the first lines say that a program wrote it", limit=(None, 0), value=lambda counted: counted.is_generated
        ),
        "code_xml_header": Column(
            "1 where it begins as XML does", limit=(None, 0), value=lambda counted: counted.has_xml_header
        ),
        "code_minified": Column(
            "1 for long lines with hardly any white space", limit=(None, 0), value=lambda counted: counted.is_minified
        ),
    },
)
