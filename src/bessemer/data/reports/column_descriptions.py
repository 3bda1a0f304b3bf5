"""What each score and count says, in a line: for `bessemer explain`, the dataset card and whoever opens a corpus."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

#: Columns whose modules say nothing themselves. `N` stands for a number.
_MEANING = {
    "language": "the most probable language (ISO 639)",
    "language_score": "how probable that language is (0 to 1)",
    "gopher_words": "words",
    "gopher_mean_word_length": "characters in words by words",
    "gopher_hashes_per_word": "`#` per word",
    "gopher_ellipses_per_word": "`…` or `...` per word",
    "gopher_bullet_lines": "share of lines that begin with a bullet",
    "gopher_ellipsis_lines": "share of lines that end in an ellipsis",
    "gopher_words_with_letter": "share of words with a letter",
    "gopher_stop_words": "how many of the, be, to, of, and, that, have, with occur",
    "gopher_repetition_duplicate_paragraphs": "share of paragraphs equal to an earlier one",
    "gopher_repetition_duplicate_paragraph_characters": "share of characters in such paragraphs",
    "gopher_repetition_duplicate_lines": "share of lines equal to an earlier one",
    "gopher_repetition_duplicate_line_characters": "share of characters in such lines",
    "gopher_repetition_top_N_gram": "share of characters in the most frequent run of N words",
    "gopher_repetition_duplicate_N_grams": "share of characters in runs of N words that occurred before",
    "c4_lorem_ipsum": "occurrences of “lorem ipsum”",
    "c4_curly_brackets": "occurrences of `{`",
    "c4_sentences": "sentences",
    "fineweb_punctuated_lines": "share of lines that end like a sentence",
    "fineweb_short_lines": "share of lines of at most 30 characters",
    "fineweb_duplicate_line_characters": "share of characters in lines equal to an earlier one",
    "fineweb_newlines_per_word": "line breaks per word",
    "code_longest_line": "characters of the longest line",
    "code_mean_line": "characters of a line on average",
    "code_alphanumeric": "share of characters that are letters or digits",
    "code_letters": "share of characters that are letters",
    "code_encoded": "share of bytes that are encoded data: base64, rows of numbers",
    "code_generated": "1 where the first lines say that a program wrote it",
    "code_xml_header": "1 where it begins as XML does",
    "code_minified": "1 for long lines with hardly any white space",
    "c4_lines_long_word": "lines removed for a word of more than 1,000 characters",
    "c4_lines_unterminated": "lines removed that do not end like a sentence",
    "c4_lines_few_words": "lines removed for fewer than three words",
    "c4_lines_javascript": "lines removed that ask for JavaScript",
    "c4_lines_policy": "lines removed that carry a policy or a notice",
    "c4_lines_citations": "marks of citations removed",
}
_ROOMS = ("bessemer.data.filters", "bessemer.data.edits")


def column_description(column: str) -> str:
    """What a column says; an empty string for one that nobody describes, as a user's own."""
    if column.startswith("language_score_"):
        return f"{_MEANING['language_score']}, of those in {column.rpartition('_')[2]}"
    number = next((word for word in column.split("_") if word.isdigit()), "N")
    described = _MEANING.get(column.replace(f"_{number}_", "_N_"))
    return described.replace("N words", f"{number} words") if described else _stated(column)


def _stated(column: str) -> str:
    """The meaning that the column's own module states: the one whose name the column begins with."""
    words = column.split("_")
    for end in range(len(words), 0, -1):
        for room in _ROOMS:
            name = f"{room}.{'_'.join(words[:end])}"
            if find_spec(name) is not None:
                return str(getattr(import_module(name), "MEANING", {}).get(column, ""))
    return ""
