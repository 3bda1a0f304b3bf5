from __future__ import annotations

import pyarrow as pa
import pytest

from bessemer.data.filters.registry import OWN_PRESETS, preset
from bessemer.data.plugins import Languages
from bessemer.data.thresholds import display_name, rejection_reasons, rule_of


def reason(limits, languages=Languages(), **scores):  # noqa: B008
    columns = {name: pa.array([value], pa.string() if name == "language" else pa.float64()) for name, value in scores.items()}
    return rejection_reasons(columns, limits, languages)[0].as_py()


def test_a_reason_says_rule_value_and_limit():
    assert reason({"gopher_mean_word_length": (3, 10)}, gopher_mean_word_length=2.14159) == "gopher: mean word length 2.142 < 3"
    assert reason({"gopher_words": (50, 100)}, gopher_words=101.0) == "gopher: words 101 > 100"


def test_both_ends_of_a_limit_are_kept():
    for value in (3.0, 10.0):
        assert reason({"score": (3, 10)}, score=value) is None


def test_the_first_rule_that_fails_is_the_reason():
    limits = {"a_b": (1, None), "c_d": (1, None)}
    assert reason(limits, a_b=0.0, c_d=0.0) == "a: b 0 < 1"
    assert reason(limits, a_b=1.0, c_d=0.0) == "c: d 0 < 1"


def test_a_missing_score_fails_its_rule():
    assert reason({"score": (None, 1)}, score=None) == "score nan > 1"
    assert reason({"score": (None, 1)}, score=float("nan")) == "score nan > 1"


def test_another_language_is_named_with_its_score():
    assert reason({}, Languages(("en", "fr")), language="de", language_score=0.934) == "language: de 0.934"
    assert reason({}, Languages(("en", "fr")), language="fr", language_score=0.1) is None
    assert reason({}, Languages(("en",)), language=None, language_score=0.5) == "language: unknown 0.5"


def test_each_language_has_its_own_lowest_probability():
    languages = Languages(("en", "de"), 0.65, {"de": 0.5})
    assert reason({}, languages, language="de", language_score=0.5) is None
    assert reason({}, languages, language="de", language_score=0.49) == "language: score 0.49 < 0.5"
    assert reason({}, languages, language="en", language_score=0.64) == "language: score 0.64 < 0.65"
    assert reason({}, languages, language="en", language_score=None) == "language: score nan < 0.65"


def test_one_language_may_be_limited_and_all_kept():
    languages = Languages(lowest={"de": 0.5})
    assert reason({}, languages, language="de", language_score=0.4) == "language: score 0.4 < 0.5"
    assert reason({}, languages, language="en", language_score=0.1) is None
    assert reason({}, languages, language=None, language_score=None) is None


def test_without_rules_everything_is_kept():
    assert reason({}, score=1.0) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("gopher: mean word length 2.1 < 3", "gopher: mean word length"),
        ("gopher: stop words 1 < 2", "gopher: stop words"),
        ("language: de 0.93", "language"),
        ("language: score 0.421 < 0.65", "language: score"),
        ("duplicate of 3f0c8e1ab2d4567890abcdef12345678", "duplicate"),
        ("near duplicate of 3f0c8e1ab2d4567890abcdef12345678 (0.87)", "near duplicate"),
        ("overlap with arc_easy, item 7", "overlap with arc_easy"),
        ("too little left without repeated lines", "too little left without repeated lines"),
        ("gopher repetition: duplicate lines 0.4 > 0.3", "gopher repetition: duplicate lines"),
        ("score2 1e-05 < 0.5", "score2"),
        ("my_score nan > 1", "my_score"),
    ],
)
def test_reasons_are_counted_without_their_figures(text, rule):
    assert rule_of(text) == rule


@pytest.mark.parametrize(
    "column", [*(column for name in OWN_PRESETS for column in preset(name)), "language_score", "brief", "score2"]
)
def test_the_rule_of_any_columns_reason_is_its_display_name(column):
    for value in (0.0, 1e-9, 1e9, -2.5, None):
        said = reason({column: (1e10, None)}, **{column: value})
        assert rule_of(said) == display_name(column)


def test_gophers_limits_are_the_published_ones():
    assert preset("gopher_quality") == {
        "gopher_words": (50, 100_000),
        "gopher_mean_word_length": (3, 10),
        "gopher_hashes_per_word": (None, 0.1),
        "gopher_ellipses_per_word": (None, 0.1),
        "gopher_bullet_lines": (None, 0.9),
        "gopher_ellipsis_lines": (None, 0.3),
        "gopher_words_with_letter": (0.8, None),
        "gopher_stop_words": (2, None),
    }
