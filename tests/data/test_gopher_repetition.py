from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.filters.registry import filter_plugin
from bessemer.data.filters.rules import gopher_repetition
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts
from tests.data import plain_python
from tests.data.plain_python import compiling, share

#: Few different words, so that n-grams of every length are repeated, overlap and tie.
REPETITIVE = st.lists(st.sampled_from(["a", "bb", "a", "东", ",", "\n", "\n\n"]), max_size=60).map(" ".join)
BLOCKS = st.lists(
    st.sampled_from(["one two three four five six\n", "seven eight\n\n", "nine ", "\n", "one two three "]), max_size=12
)
TEXT = st.text(alphabet=st.sampled_from("ab é\n\n\r #") | st.characters(codec="utf-8"), max_size=60)


def scores_of(text):
    return {
        name.removeprefix("gopher_repetition_"): column[0].as_py()
        for name, column in gopher_repetition(Texts.of([text])).items()
    }


def in_plain_python(text):
    words, paragraphs = plain_python.words(text), plain_python.paragraphs(text)
    lines = [line for line in re.split("\n+", text) if line]
    same_paragraphs, same_lines = plain_python.repeated(paragraphs), plain_python.repeated(lines)
    return {
        "duplicate_paragraphs": share(len(same_paragraphs), len(paragraphs)),
        "duplicate_paragraph_characters": share(sum(map(len, same_paragraphs)), len(text)),
        "duplicate_lines": share(len(same_lines), len(lines)),
        "duplicate_line_characters": share(sum(map(len, same_lines)), len(text)),
        **{f"top_{n}_gram": share(plain_python.characters_of_top_n_gram(words, n), len(text)) for n in (2, 3, 4)},
        **{
            f"duplicate_{n}_grams": share(plain_python.characters_of_repeated_n_grams(words, n), len(text))
            for n in (5, 6, 7, 8, 9, 10)
        },
    }


def test_a_case_worked_by_hand():
    scores = scores_of("a b\na b\n\na b\n\nc d e a b c d e a b")
    assert scores["duplicate_paragraphs"] == 0
    assert scores["duplicate_lines"] == 2 / 4
    assert scores["duplicate_line_characters"] == (3 + 3) / 33
    assert scores["top_2_gram"] == 5 * 3 / 33  # a b, five times
    assert scores["top_3_gram"] == 2 * 5 / 33  # b c d, c d e, d e a, e a b, a b a: all twice; a b a is the first
    assert scores["duplicate_5_grams"] == 5 / 33  # a b c d e: then a b are two words more, too few
    assert scores["duplicate_6_grams"] == 6 / 33  # a b c d e a
    assert scores["duplicate_8_grams"] == 0


@compiling
@given(REPETITIVE | BLOCKS.map("".join) | TEXT)
def test_any_text_scores_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


@compiling
@given(st.lists(REPETITIVE, min_size=1, max_size=5))
def test_a_text_scores_the_same_alone_and_in_a_batch(batch):
    together = gopher_repetition(Texts.of(batch))
    alone = [gopher_repetition(Texts.of([text])) for text in batch]
    for name, column in together.items():
        assert column.to_pylist() == [scores[name][0].as_py() for scores in alone]


@pytest.mark.parametrize(("unit", "share_of_5_grams"), [("x ", 0.5), ("(", 1), ("a b c d e f g h\n", 0.5), ("line\n\n", 4 / 6)])
def test_a_million_repetitions_are_measured(unit, share_of_5_grams):
    """In time linear in them: a quadratic loop would take hours."""
    text = unit * (1_000_000 // len(unit))
    assert scores_of(text)["duplicate_5_grams"] == pytest.approx(share_of_5_grams, rel=1e-3)


def test_an_empty_text_scores_zero():
    assert set(scores_of("").values()) == {0.0}


def test_every_promised_column_is_there():
    found = gopher_repetition(Texts.of(["a"]))
    assert {name: column.type for name, column in found.items()} == arrow_types(filter_plugin("gopher_repetition").columns)
