from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.evaluation.docs_questions import exact_match, longest_common_subsequence, rouge_l

words = st.lists(st.sampled_from("abcd"), max_size=9)


@given(one=words, other=words)
def test_the_longest_common_subsequence_is_that_of_the_recursion(one, other):
    @cache
    def recursion(i, j):
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + recursion(i + 1, j + 1)
        return max(recursion(i + 1, j), recursion(i, j + 1))

    assert longest_common_subsequence(one, other) == recursion(0, 0)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1: S2 and S1
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # S3
        ("Returns the SUM.", "returns the sum", 1.0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("x_1 y", "x_1", 2 / 3),
        ("", "something", 0.0),
        ("?!", "?!", 0.0),
    ],
)
def test_rouge_l_of_cases_worked_by_hand(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


@given(one=words.map(" ".join), other=words.map(" ".join))
def test_rouge_l_is_symmetric_and_within_0_and_1(one, other):
    assert rouge_l(one, other) == rouge_l(other, one)
    assert 0 <= rouge_l(one, other) <= 1


@pytest.mark.parametrize(
    ("answer", "expected"), [(" a  b\nc ", True), ("a b c", True), ("a b C", False), ("a bc", False), ("", False)]
)
def test_exact_match_sees_past_white_space_alone(answer, expected):
    assert exact_match(answer, "a b\tc") is expected
