from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.filters.gopher import COLUMNS, STOP_WORDS, gopher_quality


def scores_of(text):
    return {name: column[0].as_py() for name, column in gopher_quality(pa.array([text])).items()}


def in_plain_python(text):
    """The same definitions, a word at a time."""
    words = text.split()
    lines = [line for line in text.split("\n") if line.strip()]

    def share(part, whole):
        return part / whole if whole else 0.0

    return {
        "gopher_words": len(words),
        "gopher_mean_word_length": share(sum(map(len, words)), len(words)),
        "gopher_hashes_per_word": share(text.count("#"), len(words)),
        "gopher_ellipses_per_word": share(text.count("...") + text.count("…"), len(words)),
        "gopher_bullet_lines": share(sum(is_bullet(line) for line in lines), len(lines)),
        "gopher_ellipsis_lines": share(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
        "gopher_words_with_letter": share(sum(any(c.isalpha() for c in word) for word in words), len(words)),
        "gopher_stop_words": sum(bool(re.search(rf"\b{word}\b", text, re.I | re.A)) for word in STOP_WORDS),
    }


def is_bullet(line):
    line = line.lstrip() + "\n"
    return line[0] in "•‣" or (line[0] in "-*" and line[1].isspace())


def test_a_case_worked_by_hand():
    assert scores_of("- The cat #1 sat...\n\n• on 22 mats, and with… \n  that's all …") == {
        "gopher_words": 14,  # - The cat #1 sat... • on 22 mats, and with… that's all …
        "gopher_mean_word_length": (1 + 3 + 3 + 2 + 6 + 1 + 2 + 2 + 5 + 3 + 5 + 6 + 3 + 1) / 14,
        "gopher_hashes_per_word": 1 / 14,
        "gopher_ellipses_per_word": 3 / 14,
        "gopher_bullet_lines": 2 / 3,  # the blank line is none
        "gopher_ellipsis_lines": 1.0,
        "gopher_words_with_letter": 9 / 14,  # not - #1 • 22 …
        "gopher_stop_words": 4,  # the and with that
    }


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000\x85"])
def test_a_text_without_words_scores_zero_and_divides_by_nothing(text):
    assert set(scores_of(text).values()) == {0.0}


@pytest.mark.parametrize(
    "text",
    [
        "....",
        "a.....b",
        "...\n...\n\n...",
        "-\n- \n-x\n*\ty",
        "---\n- - -",
        "\x1c\x1d a\xa0b\u2003c\u2028d\x0be",
        "东京 カタカナ 한국어",
        "The THE thé the_ (the)",
        "e\u0301 \u0301 ª ² Ⅷ 𝔸 😀",
    ],
)
def test_hostile_texts_score_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


@given(
    # unassigned characters left out: the two have tables of different Unicode versions
    st.text(
        alphabet=st.sampled_from("ab é东#.…-*•\n\t \xa0\x1c\u2028\u30001_的'")
        | st.characters(codec="utf-8", exclude_categories=["Cn"]),
        max_size=60,
    )
)
def test_any_text_scores_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


def test_a_text_scores_the_same_alone_and_in_a_batch():
    texts = ["one two", "", "# … the be to", "- a\n- b"]
    together = gopher_quality(pa.array(texts))
    for index, text in enumerate(texts):
        assert {name: column[index].as_py() for name, column in together.items()} == scores_of(text)


def test_every_promised_column_is_there():
    found = gopher_quality(pa.array(["a"]))
    assert {name: column.type for name, column in found.items()} == COLUMNS
