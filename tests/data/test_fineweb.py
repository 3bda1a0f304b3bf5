from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.filters import measures
from bessemer.data.filters.registry import filter_plugin
from bessemer.data.filters.rules import fineweb, ratio
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts
from tests.data import plain_python
from tests.data.plain_python import compiling, share

TEXT = st.text(alphabet=st.sampled_from("ab é.!?。…\n\n\n\r \x0b\x00") | st.characters(codec="utf-8"), max_size=80)
LINES = st.lists(
    st.sampled_from(["Home", "A line that ends as sentences do.", "", " ", "x" * 30, "y" * 31, "No. "]), max_size=9
)


def scores_of(text):
    return {name: column[0].as_py() for name, column in fineweb(Texts.of([text])).items()}


def in_plain_python(text):
    lines = [line for line in text.split("\n") if line.strip()]
    ends = tuple(plain_python.TERMINALS)
    same = plain_python.repeated(lines)
    return {
        "fineweb_punctuated_lines": share(sum(line.endswith(ends) for line in lines), len(lines)),
        "fineweb_short_lines": share(sum(len(line) <= 30 for line in lines), len(lines)),
        "fineweb_duplicate_line_characters": share(sum(map(len, same)), len(text.replace("\n", ""))),
        "fineweb_newlines_per_word": share(text.count("\n"), len(plain_python.words(text))),
    }


def test_a_case_worked_by_hand():
    assert scores_of("Home\nHome\n\nThis is a sentence of more characters.\n") == {
        "fineweb_punctuated_lines": 1 / 3,
        "fineweb_short_lines": 2 / 3,
        "fineweb_duplicate_line_characters": 4 / 46,
        "fineweb_newlines_per_word": 4 / 10,
    }


@compiling
@given(TEXT | LINES.map("\n".join))
def test_any_text_scores_as_in_plain_python(text):
    assert scores_of(text) == pytest.approx(in_plain_python(text))


@compiling
@given(st.lists(LINES.map("\n".join), min_size=1, max_size=5))
def test_a_text_scores_the_same_alone_and_in_a_batch(batch):
    together = fineweb(Texts.of(batch))
    for index, text in enumerate(batch):
        assert {name: column[index].as_py() for name, column in together.items()} == scores_of(text)


def test_every_promised_column_is_there():
    found = fineweb(Texts.of(["a"]))
    assert {name: column.type for name, column in found.items()} == arrow_types(filter_plugin("fineweb").columns)


def test_no_score_is_a_negative_zero_and_a_table_is_at_most_half_full():
    assert str(measures.rounded(np.array([-0.0, -1e-9, 1.23456789])).to_pylist()) == "[0.0, 0.0, 1.234568]"
    sizes = [measures.table_size(entries) for entries in (0, 1, 8, 9, 16, 17, 64, 65)]
    assert sizes == [16, 16, 16, 32, 32, 64, 128, 256]


def test_a_share_of_nothing_is_zero():
    assert ratio(np.array([0, 1, 2]), np.array([0, 0, 1])).tolist() == [0, 0, 2]
