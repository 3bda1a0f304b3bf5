import json

import pytest
import torch

from bessemer.training import threads
from bessemer.training.config import LoopConfig
from bessemer.training.runtime import Runtime
from bessemer.training.threads import ThreadChoices, faster_threads, thread_candidates


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
    assert faster_threads(2, (2, 1)) in (1, 2)
    assert torch.get_num_threads() == 2


def test_choices_are_kept_by_step_and_repeated_on_resume(tmp_path):
    answers = iter([1, 2])
    first = ThreadChoices(tmp_path, 2, choose=lambda current, candidates: next(answers))
    assert first.resume(0) == 2
    assert [first.choose(5), first.choose(10)] == [1, 2]
    again = ThreadChoices(tmp_path, 4, choose=lambda current, candidates: pytest.fail("measured again"))
    assert [again.resume(step) for step in (0, 4, 5, 9, 10, 11)] == [2, 2, 1, 1, 2, 2]
    assert [again.choose(5), torch.get_num_threads()] == [1, 1]
    assert json.loads((tmp_path / threads.THREADS).read_text()) == {"first": 2, "by_step": {"5": 1, "10": 2}}


def test_only_auto_on_a_processor_adapts():
    cpu = torch.device("cpu")
    for given, adapts in ((None, False), (2, False), ("auto", True)):
        config = LoopConfig(dtype="float32", compile=False, threads=given)
        assert Runtime.of(config, cpu).adapts_threads == adapts
    assert not Runtime.of(LoopConfig(dtype="float32", compile=False, threads="auto"), cpu, processes=2).adapts_threads
