import pytest

from bessemer.core.errors import StaleMeasurementError
from bessemer.training.monitoring.run_metrics import ThroughputCheck


def run(check: ThroughputCheck, *seconds: float) -> None:
    for each in seconds:
        check.add_step(each)


COMPILING = (30.0, 1.0, 1.0)


def test_a_run_at_the_measured_pace_goes_on():
    run(ThroughputCheck(0.5, steps=1000), *COMPILING, *[0.6] * 400)


@pytest.mark.parametrize(("seconds", "words"), [(0.3, "1.7 times less"), (0.9, "1.8 times more")])
def test_the_first_window_may_differ_either_way(seconds, words):
    with pytest.raises(StaleMeasurementError, match=words):
        run(ThroughputCheck(0.5, steps=1000), *COMPILING, *[seconds] * 40)


def test_a_few_slow_steps_are_no_other_pace():
    run(ThroughputCheck(0.5, steps=1000), *COMPILING, *[0.5, 0.5, 3.0] * 20)


def test_it_is_not_judged_before_a_window_is_full():
    run(ThroughputCheck(0.01, steps=5000), *COMPILING, *[0.001] * 700)  # 0.7 s
    run(ThroughputCheck(5.0, steps=50), *COMPILING, *[1.0] * 19)


def test_later_only_a_faster_pace_counts_and_only_in_the_first_quarter():
    run(ThroughputCheck(0.5, steps=400), *COMPILING, *[0.5] * 20, *[2.0] * 300)
    with pytest.raises(StaleMeasurementError, match=r"5\.0 times less"):
        run(ThroughputCheck(0.5, steps=1000), *COMPILING, *[0.5] * 20, *[0.1] * 100)
    run(ThroughputCheck(0.5, steps=400), *COMPILING, *[0.5] * 100, *[0.1] * 200)
