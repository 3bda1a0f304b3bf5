from __future__ import annotations

import os
import time

import pytest

from bessemer.data.sources.io.limited import Helpers, Limited, RefusedError
from tests.cases import slow


def double(value):
    return value * 2


def hang(value):
    time.sleep(value)


def spin():
    while True:
        pass


def spin_in_native_code():
    import re

    re.match(r"(a|a)*b", "a" * 40)


def crash():
    os.kill(os.getpid(), 9)


def fill_memory():
    return len(bytearray(8 << 30))


def fail():
    raise ValueError("no good")


def prints():
    print("noise among the answers", flush=True)
    return 1


def test_results_come_back_from_the_same_helper():
    with Limited(double, 20) as limited:
        assert [limited(value) for value in (1, "a", b"x" * 2_000_000)] == [2, "aa", b"x" * 4_000_000]


@pytest.mark.parametrize(
    ("function", "arguments", "kind"),
    [
        slow(hang, (60,), "timed_out"),
        slow(spin, (), "timed_out"),
        (spin_in_native_code, (), "timed_out"),
        (crash, (), "crashed"),
        (fail, (), "unreadable_files"),
        (fill_memory, (), "unreadable_files"),
    ],
)
def test_what_goes_wrong_costs_one_call_and_the_next_one_works(function, arguments, kind):
    limited = Limited(function, 0.1 if kind == "timed_out" else 30)
    with limited:
        for _ in range(2):
            with pytest.raises(RefusedError) as refused:
                limited(*arguments)
            assert refused.value.kind == kind


def test_what_a_library_prints_does_not_disturb():
    with Limited(prints, 20) as limited:
        assert limited() == limited() == 1


def test_helpers_end_with_what_used_them():
    with Helpers() as helpers:
        assert helpers.call(double, 20, 2) == 4
        process = helpers._limited[f"{double.__module__}:double"]._process
        assert process.poll() is None
    assert process.poll() is not None
