from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.edits.line_removal import Boilerplate, boilerplate
from bessemer.data.edits.registry import edit_plugin
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts

LINES = ["Share", "Iron is a metal.", "We use cookies.", "", "   ", "Iron is a metal.  ", "é", "}", "Log in | Register"]


def without(text, **how):
    return boilerplate(Texts.of([text]), Boilerplate(**how))[0][0].as_py()


def test_furniture_goes_and_the_text_stays_to_the_byte():
    page = (
        "Home | About us | Contact\nIron melts at 1538 °C.\r\n\n  We use cookies to improve your experience. Accept?\n"
        "Share this: Twitter, Facebook (12)\nSteel shares this property.\n© 2020 Ironworks. All rights reserved."
    )
    assert without(page) == "Iron melts at 1538 °C.\r\n\nSteel shares this property.\n"
    assert {name: column[0].as_py() for name, column in boilerplate(Texts.of([page]))[1].items()} == {
        "boilerplate_lines": 4,
        "boilerplate_repeated_lines": 0,
    }


@pytest.mark.parametrize(
    "line",
    [
        "Share the load between the two furnaces.",
        "More iron",
        "Read more about it in Rae et al. (2021).",
        "def login(share, tweet):",
        "He said that we use cookies as bait, " + "and went on for long, " * 20,
        "12 | 13 | 14",
        "Print the home page, contact the author",
    ],
)
def test_lines_that_only_mention_such_words_stay(line):
    assert without(line) == line


def test_a_line_of_prose_over_and_over_stays_once():
    line = "The same sentence once more\n"
    assert without("a\n" + line * 5 + "b\n" + line * 2) == "a\n" + line + "b\n" + line * 2
    assert without(line * 2, repeats=1) == line
    assert without(line * 3 + line.strip()) == line


@pytest.mark.parametrize("line", ["    }", "[0, 0, 0, 0],", "| 1.0 |", "---", ""])
def test_equal_lines_of_code_and_tables_stay(line):
    assert without(f"{line}\n" * 6) == f"{line}\n" * 6


def test_each_kind_can_be_switched_off():
    text = "Share\nWe use cookies.\n"
    assert without(text, notices=False) == "We use cookies.\n"
    assert without(text, buttons=False) == "Share\n"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from(LINES) | st.text(max_size=4), max_size=8).map("\n".join), max_size=4))
def test_what_stays_are_lines_of_the_text_in_order_alone_as_in_a_batch(texts):
    array, counts = boilerplate(Texts.of(texts))
    assert {name: column.type for name, column in counts.items()} == arrow_types(edit_plugin("boilerplate").columns)
    for number, text in enumerate(texts):
        left = array[number].as_py()
        assert left == without(text)
        remaining = iter(text.splitlines(keepends=True) if "\r" not in text else text.split("\n"))
        assert all(line in remaining for line in (left.splitlines(keepends=True) if "\r" not in text else []))
        removed = sum(column[number].as_py() for column in counts.values())
        lines = text.count("\n") + bool(text and not text.endswith("\n"))
        assert lines - removed == left.count("\n") + bool(left and not left.endswith("\n"))
