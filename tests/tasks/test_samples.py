import random
from itertools import combinations
from statistics import fmean

import pytest

from bessemer.tasks.generate import majority, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for right in range(7):
        samples = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            assert pass_at_k(6, right, k) == pytest.approx(fmean(any(subset) for subset in combinations(samples, k)))


def test_pass_at_k_has_no_bias():
    # a sample is right with probability 0.3, so pass@4 is 1 − 0.7⁴
    draws = random.Random(0)
    estimates = [pass_at_k(8, sum(draws.random() < 0.3 for _ in range(8)), 4) for _ in range(20_000)]
    assert fmean(estimates) == pytest.approx(1 - 0.7**4, abs=0.005)


def test_more_than_all_samples_are_refused():
    with pytest.raises(ValueError, match="k must be 1 to n"):
        pass_at_k(2, 1, 3)


def test_the_majority_is_the_commonest_answer_and_of_equals_the_first():
    assert majority(["a", "b", "b", None, None, None]) == 1
    assert majority(["b", "a"]) == 0
    assert majority([None, None]) is None
