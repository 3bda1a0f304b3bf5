import random

import pytest
import torch

from bessemer.training.config import LoopConfig
from bessemer.training.monitoring.guards import OutlierDetector


def after(losses, norms=None, **options):
    """A detector that has seen these losses, and gradient norms of the same size or these."""
    detector = OutlierDetector(**options)
    for loss, norm in zip(losses, norms or losses, strict=True):
        detector.accepts(loss, norm, guarded=False)
    return detector


#: Of 128 values the median is 2, the median absolute deviation 1.
SPREAD = [1.0, 3.0] * 64
#: The median is 2, the deviation 0.01.
NARROW = [1.99, 2.01] * 64


def test_the_limit_is_six_deviations_above_the_median():
    limit = 2 + 6 * 1.4826
    assert after(SPREAD).limits().tolist() == pytest.approx([limit, limit])
    assert after(SPREAD).accepts(limit - 1e-6, limit - 1e-6)
    assert not after(SPREAD).accepts(limit + 1e-6, 2.0)
    assert not after(SPREAD).accepts(2.0, limit + 1e-6)


def test_and_a_multiple_of_the_median_for_the_loss_and_for_the_norm():
    assert after(NARROW).limits().tolist() == pytest.approx([2.6, 6.0])
    assert after(NARROW).accepts(2.59, 5.99)
    assert not after(NARROW).accepts(2.61, 2.0)
    assert not after(NARROW).accepts(2.0, 6.01)


def test_of_a_negative_loss_the_deviations_decide():
    detector = after([-value for value in NARROW], NARROW)
    assert detector.limits()[0].item() == pytest.approx(-2 + 6 * 0.014826)


def test_nothing_is_refused_before_the_window_is_full_nor_for_being_small():
    assert after([1.0, 3.0] * 63 + [1.0]).accepts(1e9, 1e9)
    assert after(SPREAD).accepts(-1e9, 0.0)


def test_only_the_last_window_counts():
    detector = after([1000.0] * 64 + NARROW)
    assert not detector.accepts(20.0, 2.0)


def test_spikes_do_not_hide_the_next():
    detector = after(NARROW)
    assert not any(detector.accepts(10.0**size, 10.0**size) for size in range(1, 20))


def test_a_lasting_change_is_accepted_after_half_a_window():
    draw = random.Random(0)
    detector = after([draw.gauss(2.0, 0.1) for _ in range(128)])
    refused = [not detector.accepts(draw.gauss(4.0, 0.1), 2.0) for _ in range(128)]
    assert 1 <= sum(refused) <= 64 and not any(refused[64:])


def test_values_that_never_differed_are_left_after_half_a_window_too():
    detector = after([0.0] * 128)
    refused = [not detector.accepts(1.0, 1.0) for _ in range(128)]
    assert refused[0] and not any(refused[65:])


def test_ordinary_noise_is_never_refused():
    draw = random.Random(0)
    detector = OutlierDetector()
    assert all(detector.accepts(3 * 0.999**step + draw.gauss(0, 0.1), draw.lognormvariate(0, 0.3)) for step in range(3000))


@pytest.mark.parametrize("factor", [1.43, 1.75])
def test_a_norm_of_the_tail_of_a_quiet_run_is_taken(factor):
    """Steps that runs of the quickstart lost: more than 6 deviations above the mean norm, at an ordinary loss."""
    draw = random.Random(1)
    losses, norms = [draw.gauss(3.6, 0.2) for _ in range(128)], [draw.gauss(0.52, 0.03) for _ in range(128)]
    norm = factor * 0.52
    values = torch.tensor(norms)
    assert norm > values.mean() + 6 * values.std()
    assert after(losses, norms).accepts(3.77, norm)


def test_in_an_unguarded_phase_nothing_is_refused_and_all_is_recorded():
    detector, other = after(NARROW), after(NARROW)
    for value in (1e3, 1e6):
        assert detector.accepts(value, value, guarded=False)
        assert not other.accepts(value, value)
    assert torch.equal(detector.state_dict()["values"], other.state_dict()["values"])
    assert not detector.accepts(float("nan"), 2.0, guarded=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad):
    detector = after(SPREAD)
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


@pytest.mark.parametrize(
    "settings, guarded",
    [
        ({}, range(10, 80)),
        ({"skip_loss_spikes": "always"}, range(100)),
        ({"skip_loss_spikes": False}, range(0)),
        ({"schedule": "cosine"}, range(10, 100)),
        ({"warmup_fraction": 0.0}, range(80)),
    ],
    ids=str,
)
def test_the_constant_phase_is_guarded_and_all_of_the_run_where_that_is_asked(settings, guarded):
    phases = {"warmup_fraction": 0.1} | ({} if "schedule" in settings else {"decay_fraction": 0.2})
    config = LoopConfig.parse({"steps": 100} | phases | settings)
    assert [step for step in range(100) if config.guards_loss_spikes(step)] == list(guarded)
