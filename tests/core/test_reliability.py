import math

import numpy as np
import pytest

from bessemer.core.statistics import choice_probability, reliability, reliability_curves, reliability_table


def test_a_case_by_hand():
    """Two bins: 0.55 said and 1/2 right, 0.9 said and all right."""
    found = reliability([0.9, 0.5, 0.9, 0.6], [1, 0, 1, 1], bins=2)
    assert found.expected_calibration_error == pytest.approx(0.5 * 0.05 + 0.5 * 0.1)
    assert [one.confidence for one in found.bins] == pytest.approx([0.55, 0.9])
    assert [one.accuracy.mean for one in found.bins] == [0.5, 1]


def test_a_calibrated_model_has_the_error_of_noise_alone_and_an_overconfident_one_its_own():
    random = np.random.default_rng(0)
    items, bins = 20_000, 15
    confidences = random.uniform(0.5, 1, items)
    right = random.random(items) < confidences
    noise = math.sqrt(2 * 0.75 * 0.25 * bins / (math.pi * items))
    assert reliability(confidences, right).expected_calibration_error == pytest.approx(noise, rel=0.5)
    wrong_by = random.random(items) < confidences - 0.2
    assert reliability(confidences, wrong_by).expected_calibration_error == pytest.approx(0.2, abs=0.02)


def test_bins_hold_equally_many_items_and_none_is_empty():
    random = np.random.default_rng(0)
    found = reliability(random.beta(20, 1, 1_000), random.random(1_000) < 0.9)
    assert {one.accuracy.items for one in found.bins} == {66, 67}
    assert len(reliability([0.5, 0.6], [1, 0]).bins) == 2


def test_the_order_of_equally_confident_items_is_no_matter():
    confidences = [0.7] * 30
    right = [1] * 15 + [0] * 15
    for order in (right, right[::-1]):
        found = reliability(confidences, order, bins=3)
        assert found.expected_calibration_error == pytest.approx(0.2)
        assert [one.accuracy.items for one in found.bins] == [30]


def test_a_crowd_of_equal_confidences_draws_no_other_into_its_bin():
    found = reliability([0.1] + [0.9] * 9, [0] + [1] * 9, bins=5)
    assert [one.accuracy.items for one in found.bins] == [1, 9]


def test_the_probability_of_a_choice_is_its_share():
    assert choice_probability(np.log([0.1, 0.3, 0.1])) == (1, pytest.approx(0.6))
    assert choice_probability([-1000.0, -1000.0]) == (0, pytest.approx(0.5))


def test_the_table_and_the_plot_say_what_the_bins_do():
    found = reliability([0.9, 0.5, 0.9, 0.6], [1, 0, 1, 1], bins=2)
    assert [row[1] for row in reliability_table(found).rows] == ["0.550", "0.900"]
    assert reliability_curves({"model": found}).series[1].points() == ([pytest.approx(0.55), pytest.approx(0.9)], [0.5, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "needs its outcome"),
        (([0.5], [1, 0]), "needs its outcome"),
        (([1.5], [1]), "between 0 and 1"),
        (([math.nan], [1]), "between 0 and 1"),
    ],
)
def test_what_has_no_calibration_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reliability(*arguments)
    with pytest.raises(ValueError, match="at least one bin"):
        reliability([0.5], [1], bins=0)
    with pytest.raises(ValueError, match="finite"):
        choice_probability([-math.inf])
