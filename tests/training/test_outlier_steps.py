import random

import pytest
import torch

from bessemer.training.outlier_steps import OutlierDetector


def after(values, **options):
    """A detector that has seen these losses, with gradient norms of the same size."""
    detector = OutlierDetector(**options)
    assert all(detector.accepts(value, value) for value in values)
    return detector


def test_the_limit_is_six_deviations_above_the_mean():
    values = [1.0, 3.0] * 64  # mean 2, variance 128 / 127
    limit = 2 + 6 * (128 / 127) ** 0.5
    assert after(values).limits().tolist() == pytest.approx([limit, limit])
    assert after(values).accepts(limit - 1e-6, limit - 1e-6)
    assert not after(values).accepts(limit + 1e-6, 2.0)
    assert not after(values).accepts(2.0, limit + 1e-6)


def test_nothing_is_refused_before_the_window_is_full_nor_for_being_small():
    assert after([1.0, 3.0] * 63 + [1.0]).accepts(1e9, 1e9)
    assert after([1.0, 3.0] * 64).accepts(-1e9, 0.0)


def test_only_the_last_window_counts():
    detector = after([1000.0] + [1.0, 3.0] * 64)
    assert not detector.accepts(20.0, 2.0)


def test_a_spike_does_not_hide_the_next():
    detector = after([1.0, 3.0] * 64)
    assert not detector.accepts(1e6, 1e6)
    assert not detector.accepts(20.0, 20.0)


def test_a_lasting_change_is_accepted_after_some_steps():
    draw = random.Random(0)
    detector = after([draw.gauss(2.0, 0.1) for _ in range(128)])
    refused = [not detector.accepts(draw.gauss(4.0, 0.1), 2.0) for _ in range(128)]
    assert 1 <= sum(refused) < 40 and not any(refused[40:])


def test_ordinary_noise_is_never_refused():
    draw = random.Random(0)
    detector = OutlierDetector()
    assert all(detector.accepts(3 * 0.999**step + draw.gauss(0, 0.1), draw.lognormvariate(0, 0.3)) for step in range(3000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad):
    detector = after([1.0, 3.0] * 64)
    before = detector.limits()
    assert not detector.accepts(bad, 2.0) and not detector.accepts(2.0, bad)
    assert torch.equal(detector.limits(), before)


def test_a_restored_detector_decides_as_the_one_that_was_saved():
    draw = random.Random(0)
    values = [draw.gauss(2.0, 0.1) * (4 if step % 50 == 49 else 1) for step in range(400)]
    whole, first, second = OutlierDetector(), OutlierDetector(), OutlierDetector()
    expected = [whole.accepts(value, value) for value in values]
    found = [first.accepts(value, value) for value in values[:177]]
    second.load_state_dict(first.state_dict())
    first.accepts(1e9, 1e9)  # what was saved is a copy
    assert found + [second.accepts(value, value) for value in values[177:]] == expected
    assert not all(expected)
