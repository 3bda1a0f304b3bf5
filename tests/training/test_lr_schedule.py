import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.training.optim.lr_schedule import (
    evenly_spaced,
    inverse_sqrt,
    log_spaced,
    warmup_stable_decay,
)
from bessemer.training.pretrain_config import PretrainConfig

SCHEDULES = [
    {"schedule": "wsd"},
    {"schedule": "wsd", "decay_shape": "1-sqrt"},
    {"schedule": "cosine"},
    {"schedule": "linear"},
    {"schedule": "inverse_sqrt"},
]


def factors(steps, **changes):
    config = PretrainConfig(steps=steps, **changes)
    return [config.learning_rates.factor(step) for step in range(steps)]


def test_it_rises_stays_and_falls():
    rates = factors(100, warmup_fraction=0.1, decay_fraction=0.2)
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([0.05 * left for left in range(20, 0, -1)])


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5), st.data())
def test_the_default_has_not_moved_by_a_bit(steps, warmup, decay, data):
    step = data.draw(st.integers(0, steps - 1))
    before = min(1.0, (step + 1) / max(1.0, warmup * steps), (steps - step) / max(1.0, decay * steps))
    assert warmup_stable_decay(step, steps, warmup=warmup * steps, decay=decay * steps) == before


@settings(deadline=None)
@given(
    st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.floats(0.01, 1)
)
def test_no_step_is_wasted_and_none_exceeds_the_peak(schedule, steps, warmup, decay, final, share):
    lengths = {"warmup_fraction": warmup} | ({"decay_fraction": decay} if schedule["schedule"] == "wsd" else {})
    config = PretrainConfig(steps=steps, final_learning_rate_fraction=final, **lengths, **schedule)
    assert 0 < config.learning_rates.factor(min(steps - 1, int(share * steps))) <= 1


def test_half_way_down_each_shape_is_where_its_formula_says():
    middle = {"warmup_fraction": 0.0, "steps": 1000}
    half = PretrainConfig(**middle, schedule="cosine").learning_rates.factor(500)
    assert half == pytest.approx(0.5) == PretrainConfig(**middle, schedule="linear").learning_rates.factor(500)
    quarter = PretrainConfig(**middle, schedule="cosine").learning_rates.factor(250)
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    decay = PretrainConfig(**middle, decay_steps=100, decay_shape="1-sqrt")
    assert decay.learning_rates.factor(925) == pytest.approx(1 - math.sqrt(0.25))
    assert inverse_sqrt(399, warmup=100) == pytest.approx(0.5)


def test_a_cosine_is_torchs():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    for factor in factors(50, schedule="cosine", warmup_steps=0, final_learning_rate_fraction=0.1):
        assert factor == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=str)
def test_it_falls_to_a_floor(schedule):
    rates = factors(1000, final_learning_rate_fraction=0.2, **schedule)
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.2, abs=0.03) and min(rates[40:]) == rates[-1] > 0.2


def test_an_inverse_root_stays_on_its_floor_and_does_not_see_the_end():
    rates = factors(1000, schedule="inverse_sqrt", warmup_steps=10, final_learning_rate_fraction=0.2)
    assert rates[9] == 1.0 and rates[-1] == 0.2
    assert factors(400, schedule="inverse_sqrt", warmup_steps=10, final_learning_rate_fraction=0.2) == rates[:400]


def test_lengths_in_steps_and_tokens_are_those_of_shares():
    shape = {"batch_size": 4, "context_length": 32}
    shares = factors(200, warmup_fraction=0.1, decay_fraction=0.25, **shape)
    assert factors(200, warmup_steps=20, decay_steps=50, **shape) == shares
    assert factors(200, warmup_tokens=20 * 128, decay_tokens=50 * 128, **shape) == shares
    assert factors(200, warmup_tokens=20 * 128, decay_steps=50, **shape) == shares


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, "together exceed 1"),
        ({"warmup_steps": 5, "warmup_fraction": 0.1}, "give exactly one of warmup_fraction, warmup_steps, warmup_tokens, not"),
        ({"decay_steps": 5, "decay_tokens": 5}, "not decay_steps and decay_tokens"),
        ({"warmup_fraction": None}, "not none"),
        ({"warmup_steps": 8, "decay_steps": 3}, "a warm-up of 8 steps and a decay of 3 exceed the run's 10"),
        ({"warmup_tokens": 10**6}, "a warm-up of 488 steps and a decay of 3 exceed the run's 10"),
        ({"schedule": "cosine", "decay_steps": 3}, "decay_steps is for schedule: wsd, and cosine has no decay phase"),
        ({"schedule": "linear", "decay_shape": "1-sqrt"}, "decay_shape: 1-sqrt is for schedule: wsd, not for linear"),
        ({"schedule": "cos"}, "'wsd', 'cosine', 'linear' or 'inverse_sqrt'"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(section, complaint):
    with pytest.raises(ConfigError, match=complaint):
        PretrainConfig.parse({"steps": 10} | section, "pretrain")


def test_a_changed_copy_keeps_the_way_in_which_lengths_are_given():
    config = PretrainConfig(minutes=1, warmup_steps=5, schedule="cosine").with_changes(steps=10, minutes=None)
    assert config.warmup_length(10) == 5 and config.decay_length(10) == 0


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 20))
def test_points_lie_inside_the_run_and_at_its_end(steps, points):
    for chosen in (evenly_spaced(steps, points), log_spaced(steps, points)):
        assert max(chosen) == steps and min(chosen) >= 1 and len(chosen) <= points


def test_points_are_spaced_as_they_say():
    assert evenly_spaced(80, 4) == {20, 40, 60, 80}
    assert log_spaced(640, 4) == {10, 40, 160, 640}
