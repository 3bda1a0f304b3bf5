"""Pages made to break a parser: no error, linear time, bounded depth."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.extraction.extract import extract
from bessemer.data.extraction.parsing import MAX_DEPTH, MAX_TAGS, parse
from tests.cases import slow_but

MARKUP = """<p> <div> </div> </a> <td> <tr> <table> </table> <ul> <li> </ul> <br> <br/> <pre> </pre> <script> </script> <!-- -->
<h1> </h1> </h2> < <> </ </> <svg> </svg> <title> </title> & &amp &#x &nbsp; \0 é 中 \x80 x. word , <dd> <dt> <style> <textarea>
<option> <select> <body> </body> <form> </p> <![CDATA[ <?x <main> hidden"""
PIECES = st.sampled_from(
    [*MARKUP.split(), " ", "\r\n", "<a href=x>", "<p class='", "<article class=post>", "<i style='display:none'>"]
)


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_any_bytes_give_text(data):
    assert isinstance(extract(data), str)


@settings(max_examples=120)
@given(st.lists(PIECES | st.text(max_size=5), max_size=60).map("".join))
def test_any_mixture_of_markup_gives_text(source):
    extract(source).encode()


@given(st.lists(PIECES, max_size=40).map("".join))
def test_the_tree_is_a_tree(source):
    page = parse(np.frombuffer(source.encode(), np.uint8))
    numbers = np.arange(len(page.tags))
    assert (page.parents[1:] < numbers[1:]).all() and (page.ends > numbers).all()
    assert (page.ends[1:] <= page.ends[page.parents[1:]]).all() and (page.depths <= MAX_DEPTH).all()
    assert (page.depths[1:] > page.depths[page.parents[1:]]).all()
    assert (np.diff(page.block_runs) > 0).all() and (page.run_starts <= page.run_ends).all()


def test_lone_surrogates_do_not_stop_a_page():
    assert "b" in extract("<p>a \ud800 b")


def test_a_hundred_thousand_levels_end_at_the_bounded_depth():
    page = parse(np.frombuffer(b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000 + b"<p>after", np.uint8))
    assert page.depths.max() == MAX_DEPTH
    assert len(page.block_elements) == 2 and page.depths[page.block_elements[1]] == 1


HOSTILE = {
    "nested": lambda n: "<div>" * n + "x",
    "nested tables": lambda n: "<table><tr><td>" * n + "x",
    "nested in a paragraph": lambda n: "<p><button>" + "<div>" * n,
    "unclosed inline": lambda n: "<b><i><a href=x>x" * n,
    "paragraphs in links": lambda n: "<a href=x><p>x" * n,
    "items": lambda n: "<ul><li>x" * n,
    "end tags": lambda n: "<p>x" + "</div></a></p>" * n,
    "attributes": lambda n: "<p " + "class=sidebar-a " * n + ">x",
    "one attribute": lambda n: '<p class="' + "relatedCommentSidebar" * n + '">x',
    "open quotes": lambda n: "<p title='" * n,
    "open comments": lambda n: "<!-- x" * n,
    "open scripts": lambda n: "<script>x</scrip" * n,
    "titles": lambda n: "<title>x</title" * n,
    "less-than signs": lambda n: "<" * 8 * n,
    "entities": lambda n: "<p>" + "&ampamp&#xfffff&nosuchentityatallhere" * n,
    "line breaks": lambda n: "x" + "<br> <b> </b>" * n,
    "blocks": lambda n: "<p>x</p>" * n,
    "headings": lambda n: "<h1>same</h1>" * n,
    "article bodies": lambda n: '"articleBody":"' * n,
    "zeros": lambda n: "\0<p>\0" * n,
}


def cpu_seconds(source: bytes, times: int) -> float:
    """Of this thread alone: what else the machine does is not in it."""
    start = time.thread_time()
    for _ in range(times):
        extract(source)
    return time.thread_time() - start


@pytest.mark.parametrize("kind", slow_but(HOSTILE.keys() - {"items", "headings"}, HOSTILE))
def test_time_is_linear_in_a_hostile_page(kind):
    """One page costs no more than sixteen pages of its sixteenth; sixteen times as much where time is quadratic."""
    parts, whole = (HOSTILE[kind](count).encode() for count in (1_000, 16_000))
    rounds = [(cpu_seconds(parts, 16), cpu_seconds(whole, 1)) for _ in range(2)]
    of_parts, of_whole = map(min, zip(*rounds, strict=True))
    assert of_whole < 4 * of_parts, f"{of_whole:.4f} s at once, {of_parts:.4f} s in parts"


@pytest.mark.slow
def test_a_page_of_fifty_megabytes():
    paragraph = b"<div class=entry-content><p>" + b"The furnace has to be heated with care, and masters know of ways. " * 4
    page = b"<title>Large</title>" + (paragraph + b"</p></div>\n") * (50_000_000 // (len(paragraph) + 11))
    assert extract(page).count("The furnace has to be heated") > 650_000


def test_after_a_million_tags_a_page_is_not_read_on():
    page = parse(np.frombuffer(b"<b>" * MAX_TAGS + b"<p>after", np.uint8))
    assert not len(page.block_elements)
