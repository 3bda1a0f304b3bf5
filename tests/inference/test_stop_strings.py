from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.inference.sampling.params import StopStrings

# few letters, so that stop strings occur, overlap and nearly occur
TEXTS = st.text("ab¶", max_size=14)
STOPS = st.lists(st.text("ab¶", min_size=1, max_size=4), max_size=3)


def reference(text, stops, unsearched=0):
    """The text before the stop string that is complete first behind what is not searched, and whether there is one."""
    for end in range(unsearched + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(TEXTS, STOPS, st.data())
def test_text_is_cut_at_the_first_stop_string_however_it_arrives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher = StopStrings(stops)
    shown = "".join(matcher.feed(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
    assert (shown + matcher.flush(), matcher.found) == reference(text, stops)


@given(TEXTS, STOPS, st.integers(0, 14), st.data())
def test_no_stop_string_ends_in_a_text_that_is_not_searched(text, stops, unsearched, data):
    unsearched = min(unsearched, len(text))
    cuts = sorted({unsearched, *data.draw(st.lists(st.integers(0, len(text)), max_size=6))})
    matcher = StopStrings(stops)
    shown = "".join(
        matcher.feed(text[start:end], search=start >= unsearched)
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
    )
    assert (shown + matcher.flush(), matcher.found) == reference(text, stops, unsearched)


@given(TEXTS, STOPS)
def test_only_what_can_still_become_a_stop_string_is_held_back(text, stops):
    matcher = StopStrings(stops)
    shown = matcher.feed(text)
    if not matcher.found:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(text.endswith(stop[:length]) for stop in stops for length in range(len(held) + 1, len(stop)))


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hello ", "wor", "ld"], "world", ["Hello ", "", ""]),
        (["a<", "|x", "|>"], "<|end|>", ["a", "<|x", "|>"]),
        (["aa", "ab"], "aab", ["", "a"]),
    ],
)
def test_pieces_by_hand(pieces, stop, expected):
    matcher = StopStrings([stop])
    assert [matcher.feed(piece) for piece in pieces] == expected


def test_a_character_costs_the_same_however_many_stop_strings_may_begin_there():
    # one is nearly complete; a hundred would each be compared with all that is held back for it
    stops = ["a" * 2_000 + "!", *(chr(0x4E00 + place) * 2_000 for place in range(100))]
    matcher = StopStrings(stops)
    started = time.perf_counter()
    assert not any(matcher.feed("a") for _ in range(1_500))
    assert time.perf_counter() - started < 5
    assert matcher.feed("b") == "a" * 1_500 + "b" and not matcher.found


def test_answers_with_the_same_stop_strings_share_what_looks_for_them():
    first, second = StopStrings(["stop", "end"]), StopStrings(["stop", "end"])
    assert first._automaton is second._automaton
