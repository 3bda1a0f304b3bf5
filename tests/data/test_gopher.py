from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.filters.registry import filter_plugin
from bessemer.data.filters.rules import STOP_WORDS, gopher_quality
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts
from tests.data import plain_python
from tests.data.plain_python import compiling, share

TEXT = st.text(
    alphabet=st.sampled_from("ab é东#.…-*•\n\t \xa0\x1c\u2028\u30001_的'\r\x00$") | st.characters(codec="utf-8"), max_size=60
)
SENTENCES = st.lists(st.sampled_from([*STOP_WORDS, "The", "and/or", "that's", ".", "\n", "- with", "..."]), max_size=12).map(
    " ".join
)


def scores_of(text):
    return {name: column[0].as_py() for name, column in gopher_quality(Texts.of([text])).items()}


def in_plain_python(text):
    """The same definitions, a word at a time."""
    every = plain_python.words(text)
    words = [word for word in every if not all(map(plain_python.is_symbol, word))]
    lines = text.splitlines()
    with_letter = [plain_python.length_in_words(word) for word in every if any(map(str.isalpha, word))]
    more = sum(with_letter) - len(with_letter)
    return {
        "gopher_words": len(words),
        "gopher_mean_word_length": share(sum(map(len, words)), len(words)),
        "gopher_hashes_per_word": share(text.count("#"), len(every)),
        "gopher_ellipses_per_word": share(text.count("...") + text.count("…"), len(every)),
        "gopher_bullet_lines": share(sum(line.lstrip().startswith(("•", "-")) for line in lines), len(lines)),
        "gopher_ellipsis_lines": share(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
        "gopher_words_with_letter": share(sum(with_letter), len(every) + more),
        "gopher_stop_words": len(set(STOP_WORDS) & set(every)),
    }


def test_a_case_worked_by_hand():
    assert scores_of("- The cat #1 sat...\n\n• on 22 mats, and with… \n  that's all …") == {
        "gopher_words": 13,  # • is no punctuation to datatrove; The cat 1 sat on 22 mats and with that 's all
        "gopher_mean_word_length": (1 + 3 + 3 + 1 + 3 + 2 + 2 + 4 + 3 + 4 + 4 + 2 + 3) / 13,
        "gopher_hashes_per_word": 1 / 19,  # the marks - # ... • , … … are words here
        "gopher_ellipses_per_word": 3 / 19,
        "gopher_bullet_lines": 2 / 4,
        "gopher_ellipsis_lines": 3 / 4,
        "gopher_words_with_letter": 10 / 19,
        "gopher_stop_words": 3,  # and with that; The is none
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
        "-\n- \n-x\n*\ty\r\n• z\r-",
        "---\n- - -",
        "\x1c\x1d a\xa0b\u2003c\u2028d\x0be",
        "东京 カタカナ 한국어",
        "the The THE thé the_ (the) t he",
        "e\u0301 \u0301 ª ² Ⅷ 𝔸 😀 \x00 $ ¿",
    ],
)
def test_hostile_texts_score_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


@compiling
@given(TEXT | SENTENCES)
def test_any_text_scores_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


def test_a_text_scores_the_same_alone_and_in_a_batch():
    texts = ["one two", "", "# … the be to", "- a\n- b"]
    together = gopher_quality(Texts.of(texts))
    for index, text in enumerate(texts):
        assert {name: column[index].as_py() for name, column in together.items()} == scores_of(text)


def test_every_promised_column_is_there():
    found = gopher_quality(Texts.of(["a"]))
    assert {name: column.type for name, column in found.items()} == arrow_types(filter_plugin("gopher_quality").columns)
