"""A corpus: before and after, thresholds, copies, in a page and in a terminal."""

from __future__ import annotations

import html
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.views import corpus, scores
from bessemer.views.corpus_terminal import show_corpus, spark
from bessemer.views.scores import drawings, effect, histograms
from tests.views.sample_run import HOSTILE, sample_run, thresholds
from tests.views.test_terminal import printed


def counts(**documents: int) -> dict:
    return {name: {"documents": count, "bytes": 10 * count} for name, count in documents.items()}


def histogram(column: str) -> scores.Histogram:
    return next(one for one in histograms(thresholds()) if one.column == column)


def rectangles(drawing: str, kind: str) -> list[tuple[float, float]]:
    """Where bars of a kind begin and how wide they are."""
    return [
        (float(x), float(width))
        for x, width in re.findall(rf'<rect class="{kind}" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing)
    ]


def lines(drawing: str) -> list[float]:
    return [float(x) for x in re.findall(r'<line class="limit" x1="([\d.]+)"', drawing)]


def test_groups_are_counted_as_the_first_stage_that_knows_them_took_them_in():
    line = {
        "collect": {"by_language": {}, "rejected_by_language": {}},
        "clean": {"by_language": counts(en=7), "rejected_by_language": counts(en=2, de=1)},
        "select": {"by_language": counts(en=4)},
    }
    english, german = corpus.before_and_after(line, "language")
    assert (english.name, english.documents, english.kept, english.kept_bytes) == ("en", 9, 4, 40)
    assert (german.name, german.documents, german.kept) == ("de", 1, 0)


def test_a_domain_that_a_full_list_does_not_name_may_still_be_there():
    many = counts(**{f"d{number}": 5 for number in range(100)})
    line = {"collect": {"by_domain": counts(rare=1) | many}, "select": {"by_domain": many}}
    rare = next(group for group in corpus.before_and_after(line, "domain") if group.name == "rare")
    assert rare.kept is None
    few = {"collect": {"by_domain": counts(rare=1, d=2)}, "select": {"by_domain": counts(d=2)}}
    assert next(group for group in corpus.before_and_after(few, "domain") if group.name == "rare").kept == 0


def test_documents_that_nobody_took_in_are_no_group():
    assert corpus.before_and_after({"collect": {"by_source": {}}}, "source") == []


def test_a_limit_inside_the_axis_is_drawn_where_the_bars_change():
    page = drawings([histogram("gopher_words")], name="t")
    dropped, kept = rectangles(page, "dropped"), rectangles(page, "kept")
    assert len(dropped) == 2 and len(kept) == 2  # below 2; above 2, and the block beyond the axis
    (limit,) = lines(page)
    assert all(x + width <= limit for x, width in dropped)
    assert all(x >= limit for x, _ in kept)


def test_a_limit_beyond_the_axis_is_drawn_between_the_blocks_at_its_end():
    page = drawings([histogram("spam_score")], name="t")
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
    page = drawings(histograms({"thresholds": {"mine": found | {"lowest": lowest, "highest": None}}}), name="t")
    svg = re.search("<svg.*</svg>", page).group()
    assert ElementTree.fromstring(svg) is not None
    bars = rectangles(svg, "kept") + rectangles(svg, "dropped")
    assert all(x >= 0 and x + width <= 240.1 for x, width in bars)


def test_a_bin_of_one_value_is_seen():
    found = {"documents": 8, "low": 0.0, "high": 4.0, "edges": [0.0, math.nextafter(0.0, 1.0), 4.0], "counts": [5, 3]}
    found |= {"below": 0, "above": 0, "lowest": None, "highest": 0.0, "outside": 3, "alone": 3}
    page = drawings(histograms({"thresholds": {"mine": found}}), name="t")
    ((kept, width),) = rectangles(page, "kept")
    ((dropped, _),) = rectangles(page, "dropped")
    assert width > 2 and lines(page) == [dropped] and kept + width <= dropped


def test_a_limit_at_the_end_of_the_axis_is_drawn_there():
    found = {"documents": 8, "low": 0.0, "high": 4.0, "edges": [0.0, 2.0, math.nextafter(4.0, 5.0)], "counts": [5, 3]}
    found |= {"below": 2, "above": 1, "lowest": 0.0, "highest": 4.0, "outside": 3, "alone": 3}
    page = drawings(histograms({"thresholds": {"mine": found}}), name="t")
    assert len(lines(page)) == 2
    assert [x < lines(page)[0] for x, _ in rectangles(page, "dropped")] == [True, False]


def test_what_a_limit_does_is_said():
    assert effect(histogram("gopher_words")) == "at least 2: drops 13 (81.2 %), 3 for this alone"
    assert effect(histogram("toxicity_score")) == "at most 3: drops none"


def test_scores_that_are_missing_break_a_limit_and_are_drawn_nowhere():
    found = {"documents": 5, "low": 0.0, "high": 1.0, "edges": [0.0, 1.0], "counts": [0], "below": 0, "above": 0}
    (one,) = histograms({"thresholds": {"mine": found | {"lowest": 0.5, "highest": None, "outside": 5, "alone": 5}}})
    assert effect(one) == "at least 0.5: drops 5 (100 %), 5 for this alone"
    assert "<rect" not in drawings([one], name="t")


def test_scores_of_stages_without_thresholds_are_drawn_without():
    stage, found = corpus.scores_stage({"clean": {"scores": {"a_b": {"low": 0, "high": 1, "counts": [1, 2]}}}, "dedup": {}})
    assert (stage, [one.limit for one in found], found[0].documents) == ("clean", [""], 3)


def test_a_line_of_signs_is_dim_outside_the_limit_and_as_high_as_the_counts():
    text = spark(histogram("gopher_words"), width=4)
    assert text.plain == "█▆┊▃▄"
    assert [str(span.style) for span in text.spans] == ["dim", "dim", "#d9622b", "#d9622b"]


def test_clusters_show_their_sizes_and_members():
    page = html.unescape(re.sub("<[^>]*>", " ", corpus.corpus(sample_run().data)))
    for expected in ("2 to 3", "A cluster of 5", "similarity 0.87", "12 passages were cut out of 7 documents"):
        assert expected in page


def test_every_part_of_a_corpus_is_printed():
    text = printed(show_corpus(sample_run().data, examples=1))
    for expected in (
        "6,814 (11.7 %)",
        "Gopher words",
        "at least 2",
        "Copies found by minhash",
        "Personal data emails",
        "By domain",
        "No text",
        "Dropped: duplicate 0.93 > 0.8",
        "shortest path",
        "ab" * 16,
    ):
        assert expected in text


def test_examples_are_as_many_as_asked_for():
    assert "shortest path" not in printed(show_corpus(sample_run().data, examples=0))


@pytest.mark.parametrize("hostile", ["[bold]x[/bold]", "\x1b[2J", "a\u202eb"])
def test_texts_from_outside_command_nothing(hostile):
    line = {
        "select": sample_run().data["select"]
        | {
            "by_source": counts(**{hostile: 3}),
            "by_reason": counts(**{hostile: 3}),
            "problems": {hostile: {hostile: 1}},
            "examples": {"kept": [{"id": "ab", "source": hostile, "text": hostile}], "dropped": {}},
        }
    }
    text = printed(show_corpus(line, examples=2))
    assert "\x1b" not in text and "\u202e" not in text
    assert hostile in text or not hostile.startswith("[")
    assert HOSTILE not in corpus.corpus(sample_run().data)
