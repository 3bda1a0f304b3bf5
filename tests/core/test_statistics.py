import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.core.statistics import (
    Estimate,
    holm,
    mean_estimate,
    mean_of_estimates,
    paired_difference,
    two_sided_p,
    two_sided_quantile,
)

REPETITIONS = 500
#: Passages with one to thirty questions each.
SIZES = np.random.default_rng(1).geometric(1 / 6, 60)
PASSAGES = np.repeat(np.arange(len(SIZES)), SIZES)


# Abramowitz and Stegun, table 26.10: t with 95 % and 99 % of the distribution between −t and t
@pytest.mark.parametrize(
    ("freedom", "at_95", "at_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (5, 2.571, 4.032), (10, 2.228, 3.169), (30, 2.042, 2.750), (120, 1.980, 2.617)],
)
def test_quantiles_of_student_t_are_those_of_the_printed_table(freedom, at_95, at_99):
    assert two_sided_quantile(0.95, freedom) == pytest.approx(at_95, abs=5e-4)
    assert two_sided_quantile(0.99, freedom) == pytest.approx(at_99, abs=1e-3)


def test_student_t_is_cauchy_with_one_degree_of_freedom_and_normal_with_many():
    for t in (0.3, 1.0, 4.0, 30.0):
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
        assert two_sided_p(t / 8, 1e6) == pytest.approx(math.erfc(t / 8 / math.sqrt(2)), rel=1e-4)


@given(st.floats(0.5, 0.999), st.floats(0.5, 1e5))
def test_the_quantile_is_the_inverse_of_the_probability(confidence, freedom):
    assert two_sided_p(two_sided_quantile(confidence, freedom), freedom) == pytest.approx(1 - confidence, rel=1e-6)


def test_the_standard_error_of_independent_items_is_the_sample_deviation_over_the_root_of_n():
    scores = np.random.default_rng(0).random(50)
    found = mean_estimate(scores)
    assert found.standard_error == pytest.approx(scores.std(ddof=1) / math.sqrt(50))
    assert (found.degrees_of_freedom, found.items, found.clusters) == (pytest.approx(49), 50, 50)


def test_clusters_add_the_products_within_them_as_in_equation_4_of_miller():
    scores = np.random.default_rng(0).random(len(PASSAGES)) + np.random.default_rng(1).random(len(SIZES))[PASSAGES]
    residuals = scores - scores.mean()
    pairs = np.outer(residuals, residuals) * (PASSAGES[:, None] == PASSAGES[None])
    n = len(scores)
    equation_4 = residuals.var(ddof=1) / n + (pairs.sum() - np.trace(pairs)) / n**2
    assert mean_estimate(scores, PASSAGES).standard_error ** 2 == pytest.approx(equation_4 * 60 / 59, rel=2e-3)


def test_questions_asked_five_times_over_are_as_many_questions():
    scores = np.random.default_rng(0).random(20)
    once, copied = mean_estimate(scores), mean_estimate(np.repeat(scores, 5), np.repeat(np.arange(20), 5))
    assert copied.standard_error == pytest.approx(once.standard_error)
    assert copied.degrees_of_freedom == pytest.approx(19)


def test_a_cluster_with_most_items_leaves_few_degrees_of_freedom():
    clusters = [0] * 100 + list(range(1, 31)) * 2
    assert mean_estimate(np.arange(160.0), clusters).degrees_of_freedom < 3


def mean_chance():
    """Mean over passages of the chance of a right answer where its logit is normal around 0.7, deviation 1.5: by quadrature."""
    hardness, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((weights / (1 + np.exp(-1.5 * hardness - 0.7))).sum() / weights.sum())


def clustered_answers(random):
    """Right or wrong answers to questions on passages, each as hard as it is."""
    chances = 1 / (1 + np.exp(-1.5 * random.normal(size=len(SIZES)) - 0.7))
    return (random.random(len(PASSAGES)) < chances[PASSAGES]).astype(float)


def covers(estimate, truth):
    low, high = estimate.interval()
    return low <= truth <= high


def test_clustered_intervals_hold_the_truth_as_often_as_they_say_and_others_do_not():
    random = np.random.default_rng(2)
    truth = mean_chance()
    clustered, unclustered = 0, 0
    for _ in range(REPETITIONS):
        scores = clustered_answers(random)
        clustered += covers(mean_estimate(scores, PASSAGES), truth)
        unclustered += covers(mean_estimate(scores), truth)
    assert 0.93 <= clustered / REPETITIONS <= 0.97
    assert unclustered / REPETITIONS < 0.75


def test_intervals_of_few_independent_items_hold_the_truth_thanks_to_student_t():
    random = np.random.default_rng(4)
    by_t, by_normal = 0, 0
    for _ in range(REPETITIONS):
        found = mean_estimate(random.normal(0.2, 1, 6))
        by_t += covers(found, 0.2)
        by_normal += abs(found.mean - 0.2) <= 1.96 * found.standard_error
    assert 0.93 <= by_t / REPETITIONS <= 0.97
    assert by_normal / REPETITIONS < 0.92


def test_the_paired_test_keeps_its_level_where_one_without_clusters_rejects_equal_models_far_too_often():
    random = np.random.default_rng(3)
    clustered, unclustered = 0, 0
    for _ in range(REPETITIONS):
        # two equally good models: each finds some passages easier than the other does
        easier = random.normal(size=len(SIZES))[PASSAGES]
        scores, other = easier / 2 + random.normal(0, 0.7, len(PASSAGES)), -easier / 2 + random.normal(0, 0.7, len(PASSAGES))
        clustered += paired_difference(scores, other, PASSAGES).p_value <= 0.05
        unclustered += paired_difference(scores, other).p_value <= 0.05
    assert clustered / REPETITIONS <= 0.065
    assert unclustered / REPETITIONS > 0.4


def test_what_both_models_find_hard_cancels_in_the_paired_difference():
    random = np.random.default_rng(0)
    hard = random.normal(size=200)
    scores, other = hard + 0.1 * random.normal(size=200), hard + 0.1 * random.normal(size=200)
    separate = math.hypot(mean_estimate(scores).standard_error, mean_estimate(other).standard_error)
    paired = paired_difference(scores, other)
    assert paired.standard_error < separate / 5
    covariance = np.cov(scores, other)
    expected = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 200
    assert paired.standard_error**2 == pytest.approx(expected)


def test_the_p_value_is_below_the_level_exactly_where_the_interval_excludes_zero():
    random = np.random.default_rng(5)
    for _ in range(50):
        found = mean_estimate(random.normal(0.4, 1, 25))
        low, high = found.interval(0.95)
        assert (found.p_value < 0.05) == (low > 0 or high < 0)


def test_all_right_is_not_certain():
    low, high = mean_estimate([1.0] * 20).interval(bounds=(0, 1))
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert mean_estimate([0.1] * 10).standard_error == 0


def test_the_same_flip_of_every_item_is_as_likely_as_coins_that_agree():
    assert paired_difference([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]).p_value == 0.25
    assert paired_difference([1.0, 0.0], [1.0, 0.0]).p_value == 1


def test_one_item_or_one_cluster_says_nothing_about_the_next():
    alone = mean_estimate([1.0])
    assert alone.interval() == (-math.inf, math.inf)
    assert mean_estimate([0.0, 1.0], ["a", "a"]).interval(bounds=(0, 1)) == (0, 1)
    assert mean_estimate([0.5, 1.0], ["a", "a"]).p_value == 1


def test_intervals_end_at_the_bounds():
    assert mean_estimate([1.0, 1.0, 0.0]).interval(bounds=(0, 1)) == (0, 1)


def test_holm_on_a_case_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []


def test_holm_rarely_rejects_any_of_many_true_hypotheses():
    random = np.random.default_rng(6)
    assert np.mean([holm(random.random(20)).min() <= 0.05 for _ in range(REPETITIONS)]) <= 0.065
    assert np.mean([random.random(20).min() <= 0.05 for _ in range(REPETITIONS)]) > 0.5


def test_the_mean_of_equally_sure_tasks_is_surer_by_the_root_of_their_number():
    tasks = [Estimate(mean, 0.02, 99, 100, 100) for mean in (0.2, 0.4, 0.6, 0.8)]
    found = mean_of_estimates(tasks)
    assert (found.mean, found.standard_error) == (pytest.approx(0.5), pytest.approx(0.01))
    assert found.degrees_of_freedom == pytest.approx(4 * 99)
    unknown = mean_of_estimates([*tasks, mean_estimate([1.0])])
    assert unknown.p_value == 1 and math.isinf(unknown.standard_error)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: mean_estimate([]), "at least one"),
        (lambda: mean_estimate([0.5, math.nan]), "finite"),
        (lambda: mean_estimate([0.5, 1.0], ["a"]), "2 scores and 1 clusters"),
        (lambda: paired_difference([0.5], [0.5, 1.0]), "as many"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: mean_of_estimates([]), "at least one"),
        (lambda: two_sided_quantile(1.0, 3), "between 0 and 1"),
        (lambda: two_sided_p(1.0, 0), "positive"),
    ],
)
def test_what_cannot_be_estimated_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
