import numpy as np
import pytest

from bessemer.core.statistics import paired_bootstrap


def test_the_interval_is_near_the_normal_one_for_many_items():
    random = np.random.default_rng(0)
    differences = random.normal(0.3, 1.0, 400)
    other = random.normal(0, 5, 400)
    found = paired_bootstrap((other + differences).tolist(), other.tolist(), seed=1)
    error = differences.std() / 20
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_what_both_find_hard_cancels():
    found = paired_bootstrap([0.1, 0.9, 0.5, 0.3], [0.0, 0.8, 0.4, 0.2], seed=1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_interval_is_a_function_of_the_seed():
    scores, other = np.random.default_rng(0).random((2, 50)).tolist()
    assert paired_bootstrap(scores, other, seed=1) == paired_bootstrap(scores, other, seed=1)
    assert paired_bootstrap(scores, other, seed=1) != paired_bootstrap(scores, other, seed=2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        sample = random.normal(0, 1, 60)
        found = paired_bootstrap(sample.tolist(), [0.0] * 60, seed=trial, resamples=500)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("scores", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_scores_that_are_not_paired_are_refused(scores, other):
    with pytest.raises(ValueError, match="paired scores"):
        paired_bootstrap(scores, other, seed=0)
