from __future__ import annotations

import itertools
import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from bessemer.data import limited as limited_module
from bessemer.data.limited import Helpers, Limited, RefusedError
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


def read(path):
    return path.read_text(encoding="utf-8")


def fail():
    raise ValueError("no good")


def prints():
    print("noise among the answers", flush=True)
    return 1


def test_results_come_back_from_the_same_helper():
    with closing(Limited(double, 20)) as limited:
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
    with closing(limited):
        for _ in range(2):
            with pytest.raises(RefusedError) as refused:
                limited(*arguments)
            assert refused.value.kind == kind


def test_what_a_library_prints_does_not_disturb():
    with closing(Limited(prints, 20)) as limited:
        assert limited() == limited() == 1


def test_helpers_end_with_what_used_them():
    with closing(Helpers()) as helpers:
        assert helpers.call(double, 20, 2) == 4
        process = helpers._limited[f"{double.__module__}:double"]._process
        assert process.poll() is None
    assert process.poll() is not None


def test_a_helper_that_works_slowly_because_of_others_is_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    asked = itertools.count()

    def processor_seconds(pid):
        if (used := next(asked)) == 4:
            (tmp_path / "pipe").write_text("done", encoding="utf-8")
        return float(used)

    monkeypatch.setattr(limited_module, "_processor_seconds", processor_seconds)
    monkeypatch.setattr(limited_module, "_CLOCK_FACTOR", 0.001)
    with closing(Limited(read, 5)) as limited:
        assert limited(tmp_path / "pipe") == "done"


def test_a_helper_that_waits_without_working_is_given_up(monkeypatch):
    monkeypatch.setattr(limited_module, "_CLOCK_FACTOR", 0.01)
    monkeypatch.setattr(limited_module, "_processor_seconds", lambda pid: 1.0)
    with closing(Limited(hang, 5)) as limited, pytest.raises(RefusedError, match="took more than 5 seconds"):
        limited(60)


def test_the_processor_time_of_a_process_is_known_where_the_system_tells():
    begun = time.process_time()
    while time.process_time() < begun + 0.05:
        pass
    assert not Path("/proc/self/stat").exists() or 0.04 < limited_module._processor_seconds(os.getpid()) < 1e6
    assert limited_module._processor_seconds(-1) == 0.0


def test_a_helper_that_cannot_be_started_is_given_up(monkeypatch):
    with (
        closing(Limited("bessemer.data.no_such_module:f", 5)) as limited,
        pytest.raises(RefusedError, match="could not be started"),
    ):
        limited()
    monkeypatch.setattr(limited_module, "_START_SECONDS", 0.0)
    with closing(Limited(double, 5)) as limited, pytest.raises(RefusedError, match="could not be started"):
        limited(1)
