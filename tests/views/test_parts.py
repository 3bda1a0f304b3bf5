"""Parts of a report as HTML: what is shown is what is, and text stays text."""

from __future__ import annotations

import html
import math
import re
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.core.report import (
    Answer,
    Answers,
    Cell,
    Column,
    Curves,
    Document,
    Documents,
    Facts,
    Folded,
    Heading,
    HeatMap,
    HeatMaps,
    Histograms,
    Sample,
    Samples,
    Series,
    Table,
    Text,
    Tokens,
    Verbatim,
)
from bessemer.views.parts_terminal import show_parts
from bessemer.views.report import draw
from tests.views.sample_run import HOSTILE
from tests.views.test_terminal import printed


def drawn(part) -> str:
    return draw(part, (f"t-{number}" for number in count(1)))


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@given(st.lists(st.text(alphabet=st.characters(categories=["L", "M", "N", "P", "S"], include_characters=" \n"))))
def test_tokens_joined_are_the_text(pieces):
    assert text_of(drawn(Tokens(pieces))) == "".join(pieces).replace("\n", "↵\n")


@given(st.lists(st.text()))
def test_every_character_of_a_token_is_seen(pieces):
    assert all(character.isprintable() or character in "\n\t" for character in text_of(drawn(Tokens(pieces))))
    assert text_of(drawn(Tokens(["a\x1b[2J\u202e\tb\x7f\n"]))) == "a␛[2J⟨U+202E⟩→\tb␡↵\n"


def test_neighbouring_tokens_differ_in_colour():
    colours = re.findall(r'class="(t\d)"', drawn(Tokens(["a"] * 11)))
    assert len(colours) == 11
    assert all(one != other for one, other in pairwise(colours))


@given(st.text(), st.text(), st.text())
def test_documents_and_their_reasons_are_text(text, source, reason):
    page = drawn(Documents([Document(text, source, reason=reason)]))
    assert set(re.findall(r"</?([a-z]+)", page)) <= {"article", "header", "span", "pre"}
    assert text in text_of(page)


def test_nested_values_and_hashes_are_no_facts():
    page = drawn(Facts({"steps": 3, "layers": [1], "tokenizer_hash": "abc"}))
    assert page.count("<dt>") == 1


def test_a_cell_is_a_figure_with_its_bar_or_a_bar_alone():
    columns = [Column("Name"), Column("Bar"), Column("Figure", True)]
    page = drawn(Table(columns, [[Cell("a", strong=True), Cell(share=0.6, rest=0.4), Cell("7", share=1.0)]], bars="large"))
    assert page.startswith('<div class="large-bars">') and "<b>a</b>" in page
    assert re.findall(r"width:([\d.]+)%", page) == ["60.00", "40.00", "100.00"]
    assert text_of(page) == "NameBarFigurea7"


def test_remarks_stand_behind_the_text_and_faults_are_marked():
    page = drawn(Table([Column("A"), Column("B")], [[Cell("xz", remark="baseline"), Cell("not exactly", warning=True)]]))
    assert 'xz <span class="soft">baseline</span>' in page and '<span class="differs">not exactly</span>' in page


def test_rows_have_as_many_cells_as_the_table_has_columns():
    with pytest.raises(AssertionError):
        Table([Column("A")], [["1", "2"]])


def test_what_is_folded_away_stands_behind_its_summary():
    assert drawn(Folded("more", [Text("a")])) == '<details><summary>more</summary><p class="soft">a</p></details>'
    page = drawn(Folded((Cell("Short"), Cell("7", share=0.5), Cell(remark="1 kB")), [Verbatim("a")]))
    assert text_of(page) == "Short71 kBa"


def test_drawings_of_one_section_have_names_of_their_own():
    curves = Curves([Series("loss", [1, 2], [2.0, 1.0])], "Loss")
    page = draw(Folded("both", [curves, curves]), (f"t-{number}" for number in count(1)))
    assert re.findall(r'<title id="([^"]*)"', page) == ["t-1-title", "t-2-title"]


def test_shades_follow_the_logarithm_and_zero_has_none():
    values = [[5.0, 50.0], [0.0, math.nan]]
    page = drawn(HeatMaps([HeatMap("T", values, ["a", "b"], ["1", "2"], "place", "step", logarithmic=True)]))
    shades = {name: float(shade) for shade, name in re.findall(r'fill-opacity:([\d.]+)"><title>([^<:]*)', page)}
    assert shades == {"a, step 1": 0.08, "a, step 2": 1.0, "b, step 1": 0.0}
    assert "b, step 2: none" in page


def test_names_of_columns_do_not_touch():
    steps = [f"{step}" for step in range(10_000, 10_240, 10)]
    page = drawn(HeatMaps([HeatMap("T", [[1.0] * 24], ["a"], steps, "place", "step")]))
    places = [int(place) for place in re.findall(r'<text x="(\d+)" y="\d+" text-anchor="middle">', page)]
    assert min(after - before for before, after in pairwise(places)) >= 5 * 5


HOSTILE_PARTS = (
    Heading(HOSTILE),
    Text(HOSTILE),
    Text(HOSTILE, lead=True),
    Verbatim(HOSTILE),
    Facts({HOSTILE: HOSTILE}),
    Table([Column(HOSTILE)], [[HOSTILE], [Cell(HOSTILE, share=1.0)], [Cell(HOSTILE, remark=HOSTILE)]]),
    Curves([Series(HOSTILE, [1, 2], [1.0, 2.0])], HOSTILE, x_label=HOSTILE, baselines={HOSTILE: 1.0}),
    HeatMaps([HeatMap(HOSTILE, [[1.0]], [HOSTILE], [HOSTILE], HOSTILE, HOSTILE)]),
    Histograms([]),
    Tokens([HOSTILE]),
    Tokens([HOSTILE], listed=True),
    Documents([Document(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]),
    Answers([Answer(question=HOSTILE, expected=HOSTILE, answer=HOSTILE, model=HOSTILE)]),
    Samples([Sample(1, HOSTILE, HOSTILE)]),
    Folded(HOSTILE, [Text(HOSTILE)]),
    Folded([Cell(HOSTILE)], [Text(HOSTILE)]),
)


@pytest.mark.parametrize("part", HOSTILE_PARTS, ids=lambda part: type(part).__name__)
def test_no_part_gives_a_page_an_element_from_outside(part):
    assert "<script" not in drawn(part)


@pytest.mark.parametrize("hostile", ["[bold]x[/bold]", "\x1b[2J", "a\u202eb"])
def test_no_part_commands_a_terminal(hostile):
    parts = [
        Heading(hostile),
        Text(hostile),
        Facts({hostile: hostile}),
        Table([Column(hostile)], [[hostile], [Cell(hostile, share=1.0, remark=hostile)]]),
        Documents([Document(hostile, hostile, hostile, hostile)]),
        Answers([Answer(question=hostile, expected=hostile, answer=hostile, model=hostile)]),
        Folded(hostile, [Tokens([hostile])]),
    ]
    for drawn_part in show_parts(parts):
        text = printed(drawn_part)
        assert "\x1b" not in text and "\u202e" not in text
