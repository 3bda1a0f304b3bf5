import json

import pytest
import torch

from bessemer.model.device import with_threads
from bessemer.training import runtime as threads
from bessemer.training.config import LoopConfig
from bessemer.training.runtime import Runtime, ThreadChoices, _work_per_second, faster_threads, thread_candidates


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(**rates):
    """Work a second by number of threads, as `threads_2=…`."""
    return lambda number, seconds: rates[f"threads_{number}"]


@pytest.mark.parametrize(("cores", "numbers"), [(1, (1,)), (2, (2, 1)), (4, (4, 3, 2)), (16, (16, 15, 8))])
def test_all_cores_all_but_one_and_half_of_them_are_compared(cores, numbers):
    assert thread_candidates(cores) == numbers


def test_fewer_threads_are_taken_where_they_compute_more():
    busy = machine(threads_2=50, threads_1=90)
    assert faster_threads(2, (2, 1), busy) == 1
    assert faster_threads(1, (2, 1), machine(threads_2=180, threads_1=90)) == 2


def test_a_small_difference_changes_nothing():
    assert faster_threads(2, (2, 1), machine(threads_2=100, threads_1=110)) == 2


def test_measuring_takes_a_quarter_of_a_second_and_leaves_the_threads():
    torch.set_num_threads(2)
    spent = []
    faster_threads(2, (2, 1), lambda number, seconds: spent.append(seconds) or 1.0)
    assert 0.2 <= sum(spent) <= 0.3
    assert faster_threads(2, (2, 1), _work_per_second) in (1, 2)
    assert torch.get_num_threads() == 2


def test_choices_are_kept_by_step_and_repeated_on_resume(tmp_path):
    answers = iter([1, 2])
    first = ThreadChoices(tmp_path, 2, choose=lambda current, candidates: next(answers))
    assert first.resume(0) == 2
    chosen = [first.after_step(step, 0.1, validated=step % 5 == 0) for step in range(1, 11)]
    assert chosen == [None] * 4 + [1] + [None] * 4 + [2]
    again = ThreadChoices(tmp_path, 4, choose=lambda current, candidates: pytest.fail("measured again"))
    assert [again.resume(step) for step in (0, 4, 5, 9, 10, 11)] == [2, 2, 1, 1, 2, 2]
    assert again.resume(3) == 2
    # a validation that there was not before changes nothing among steps that are repeated
    assert [again.after_step(step, 0.1, validated=True) for step in range(4, 11)] == [None, 1, None, None, None, None, 2]
    assert json.loads((tmp_path / threads.THREADS).read_text(encoding="utf-8")) == {"first": 2, "by_step": {"5": 1, "10": 2}}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    return now


def test_cores_that_are_not_used_are_looked_at_every_ten_seconds(tmp_path, clock):
    answers = iter([1, 1, 2])
    choices = ThreadChoices(tmp_path, 2, choose=lambda current, candidates: next(answers))
    choices.resume(0)
    found = []
    for step in range(1, 40):
        clock[0] += 1.0
        found.append(choices.after_step(step, 1.0, validated=step == 3))
    assert {step: number for step, number in enumerate(found, start=1) if number} == {3: 1, 13: 1, 23: 2}


def test_steps_that_become_slow_are_a_reason_to_choose_again(tmp_path, clock):
    choices = ThreadChoices(tmp_path, 2, choose=lambda current, candidates: 1)
    choices.resume(0)
    found = []
    for step in range(1, 20):
        clock[0] += 2.0
        found.append(choices.after_step(step, 1.0 if step < 10 else 2.0, validated=False))
    # the third slow step in a row
    assert next(step for step, number in enumerate(found, start=1) if number) == 12


def test_the_threads_of_a_moment_are_given_back():
    torch.set_num_threads(2)
    with with_threads(1):
        assert torch.get_num_threads() == 1
    with with_threads(None):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_only_auto_on_a_processor_adapts():
    cpu = torch.device("cpu")
    for given, adapts in ((None, False), (2, False), ("auto", True)):
        config = LoopConfig(dtype="float32", compile=False, threads=given)
        assert Runtime.of(config, cpu).adapts_threads == adapts
    assert not Runtime.of(LoopConfig(dtype="float32", compile=False, threads="auto"), cpu, processes=2).adapts_threads
