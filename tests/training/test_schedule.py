import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.training.schedule import evenly_spaced, ever_rarer, warmup_stable_decay


def factors(steps, warmup, decay):
    return [warmup_stable_decay(step, steps, warmup_fraction=warmup, decay_fraction=decay) for step in range(steps)]


def test_it_rises_stays_and_falls():
    rates = factors(100, 0.1, 0.2)
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([0.05 * left for left in range(20, 0, -1)])


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5))
def test_no_step_is_wasted_and_none_exceeds_the_peak(steps, warmup, decay):
    assert all(0 < factor <= 1 for factor in factors(steps, warmup, decay))


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 20))
def test_points_lie_inside_the_run_and_at_its_end(steps, points):
    for chosen in (evenly_spaced(steps, points), ever_rarer(steps, points)):
        assert max(chosen) == steps and min(chosen) >= 1 and len(chosen) <= points


def test_points_are_spaced_as_they_say():
    assert evenly_spaced(80, 4) == {20, 40, 60, 80}
    assert ever_rarer(640, 4) == {10, 40, 160, 640}
