"""Histograms of scores with their limits."""

from __future__ import annotations

import math
import re
from itertools import count
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.report import Histogram
from bessemer.data.report import histograms
from bessemer.views.report import drawings
from tests.views.sample_run import thresholds


def histogram(title: str) -> Histogram:
    return next(one for one in histograms(thresholds()) if one.title == title)


def drawn(found: list[Histogram]) -> str:
    return drawings(found, (f"t-{number}" for number in count(1)))


def rectangles(drawing: str, kind: str) -> list[tuple[float, float]]:
    """Where bars of a kind begin and how wide they are."""
    return [
        (float(x), float(width))
        for x, width in re.findall(rf'<rect class="{kind}" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing)
    ]


def lines(drawing: str) -> list[float]:
    return [float(x) for x in re.findall(r'<line class="limit" x1="([\d.]+)"', drawing)]


def test_a_limit_inside_the_axis_is_drawn_where_the_bars_change():
    page = drawn([histogram("gopher: words")])
    dropped, kept = rectangles(page, "dropped"), rectangles(page, "kept")
    assert len(dropped) == 2 and len(kept) == 2  # below 2; above 2, and the block beyond the axis
    (limit,) = lines(page)
    assert all(x + width <= limit for x, width in dropped)
    assert all(x >= limit for x, _ in kept)


def test_a_limit_beyond_the_axis_is_drawn_between_the_blocks_at_its_end():
    page = drawn([histogram("spam: score")])
    (dropped,) = rectangles(page, "dropped")
    (limit,) = lines(page)
    assert max(x + width for x, width in rectangles(page, "kept")) < limit < dropped[0]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.none() | st.floats(-9, 9),
)
def test_whatever_is_drawn_stays_in_its_place(inside, below, above, lowest):
    found = {"low": 0.0, "high": 4.0, "edges": sorted({0.0, 1.0, 2.0, 3.0, 4.0} | ({lowest} if lowest is not None else set()))}
    found |= {
        "counts": (inside * 2)[: len(found["edges"]) - 1],
        "documents": 1,
        "below": below,
        "above": above,
        "outside": 0,
        "alone": 0,
    }
    page = drawn(histograms({"thresholds": {"mine": found | {"lowest": lowest, "highest": None}}}))
    svg = re.search("<svg.*</svg>", page).group()
    assert ElementTree.fromstring(svg) is not None
    bars = rectangles(svg, "kept") + rectangles(svg, "dropped")
    assert all(x >= 0 and x + width <= 240.1 for x, width in bars)


def test_a_bin_of_one_value_is_seen():
    found = {"documents": 8, "low": 0.0, "high": 4.0, "edges": [0.0, math.nextafter(0.0, 1.0), 4.0], "counts": [5, 3]}
    found |= {"below": 0, "above": 0, "lowest": None, "highest": 0.0, "outside": 3, "alone": 3}
    page = drawn(histograms({"thresholds": {"mine": found}}))
    ((kept, width),) = rectangles(page, "kept")
    ((dropped, _),) = rectangles(page, "dropped")
    assert width > 2 and lines(page) == [dropped] and kept + width <= dropped


def test_a_limit_at_the_end_of_the_axis_is_drawn_there():
    found = {"documents": 8, "low": 0.0, "high": 4.0, "edges": [0.0, 2.0, math.nextafter(4.0, 5.0)], "counts": [5, 3]}
    found |= {"below": 2, "above": 1, "lowest": 0.0, "highest": 4.0, "outside": 3, "alone": 3}
    page = drawn(histograms({"thresholds": {"mine": found}}))
    assert len(lines(page)) == 2
    assert [x < lines(page)[0] for x, _ in rectangles(page, "dropped")] == [True, False]


def test_scores_that_are_missing_break_a_limit_and_are_drawn_nowhere():
    found = {"documents": 5, "low": 0.0, "high": 1.0, "edges": [0.0, 1.0], "counts": [0], "below": 0, "above": 0}
    (one,) = histograms({"thresholds": {"mine": found | {"lowest": 0.5, "highest": None, "outside": 5, "alone": 5}}})
    assert one.effect == "at least 0.5: drops 5 (100 %), 5 for this alone"
    assert "<rect" not in drawn([one])
