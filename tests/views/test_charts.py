"""Curves."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.report import Curves, Series
from bessemer.training.report import training_curves
from bessemer.views.charts import _moving_average, line_chart


def test_points_that_are_no_numbers_are_left_out():
    series = Series("loss", [1, 2, 3, 4], [1.0, math.nan, None, 2.0])
    assert series.points() == ([1, 4], [1.0, 2.0])


def test_chart_without_a_point_is_nothing():
    assert line_chart(Curves([Series("loss", [1], [math.inf])], "A"), name="a") == ""
    assert [line_chart(curves, name="a") for curves in training_curves([])] == [""] * 4


def test_label_is_text_and_not_mathematics():
    series = [Series("$x_1$ <b>", [1, 2], [1.0, 2.0]), Series("other", [1, 2], [2.0, 1.0])]
    chart = line_chart(Curves(series, "T", baselines={"$b$": 1.5}), name="a")
    assert "$x_1$ &lt;b&gt;" in chart and "$b$ 1.50" in chart


def test_two_charts_of_one_page_share_no_id():
    records = [{"step": step, "loss": 1.0 / step, "bits_per_byte": 2.0} for step in range(1, 90)]
    page = "".join(line_chart(curves, name=f"a-{number}") for number, curves in enumerate(training_curves(records) * 2))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_each_kind_of_metric_has_its_chart():
    records = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 100},
        {"step": 2, "loss": 2.0, "validation_loss": 2.5, "bits_per_byte": 1.9, "learning_rate": 1e-3, "tokens_per_second": 90},
    ]
    page = "".join(line_chart(curves, name="a") for curves in training_curves(records))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "Bits per byte of held-out text", "Loss, nats per token", "Learning rate", "Tokens per second",
    ]  # fmt: skip
    assert ">validation</text>" in page


@given(st.floats(-100, 100), st.integers(1, 500))
def test_average_of_a_constant_is_the_constant(value, count):
    assert _moving_average([value] * count) == pytest.approx([value] * count, abs=1e-6)


def test_average_does_not_lag_behind_a_steep_beginning():
    values = [10 - 0.01 * step for step in range(900)]
    assert _moving_average(values)[:800] == pytest.approx(values[:800])


_values = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(deadline=None, max_examples=15)
@given(st.lists(_values, min_size=1, max_size=80))
def test_any_curve_is_drawn_or_left_out(values):
    chart = line_chart(Curves([Series("a", range(len(values)), values)], "A", averaged=True), name="a")
    assert ("<svg" in chart) == any(math.isfinite(value) for value in values)
