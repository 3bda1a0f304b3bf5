"""Runs of words that a text shares with documents."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.corpus.shared_spans import SharedSpan, SpanFinder, longest_apart

WORDS = st.lists(st.sampled_from(["a", "b", "c.", "(d"]), max_size=14).map(" ".join)


def shared(text, other, words=3):
    finder = SpanFinder(text, words)
    return finder, [text[span.start : span.end] for span in finder.spans(other)]


def test_a_span_goes_on_as_far_as_the_other_text_does():
    finder, found = shared(
        "we say that the old mill stands by the river, they say", "Here the old mill stands by the sea and they say"
    )
    assert found == ["the old mill stands by the"]
    assert re.search(finder.pattern, "an old mill stands") and not re.search(finder.pattern, "old mill, stands")
    assert SpanFinder("two words", 3).pattern is None and SpanFinder("", 3).spans("x") == []


def test_of_several_places_the_longest_is_taken():
    finder, found = shared("a b c d e", "a b c x a b c d e")
    assert found == ["a b c d e"] and finder.spans("a b c x a b c d e")[0].place == 8


@given(WORDS, WORDS)
def test_every_window_that_is_there_lies_in_a_span_and_every_span_is_there(text, other):
    finder = SpanFinder(text, 3)
    spans = finder.spans(other)
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for first, last in zip(words, words[2:], strict=False):
        if text[first[0] : last[1]] in other:
            assert any(span.start <= first[0] < span.end for span in spans)
            assert re.search(finder.pattern, other)
    for span in spans:
        assert text[span.start : span.end] == other[span.place : span.place + span.end - span.start]


def test_spans_that_overlap_give_way_to_the_longest():
    spans = [SharedSpan(0, 10, 5), SharedSpan(8, 30, 0), SharedSpan(31, 35, 2), SharedSpan(8, 30, 9)]
    assert list(longest_apart(spans)) == [(8, 30), (31, 35)]
