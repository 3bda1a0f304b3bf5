"""The processes that tests of several ranks share: a test that fails takes no other with it, and none leaves threads."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from tests.distributed.pool import Pool


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


def rank_behind(first: int, ending: int | None = None) -> int:
    if dist.get_rank() == ending:
        os._exit(1)
    return first + dist.get_rank()


def test_after_a_process_that_has_ended_there_are_new_ones(pool):
    with pytest.raises(AssertionError, match="rank 1: its process has ended"):
        pool.run(rank_behind, first=0, ending=1)
    assert pool.run(rank_behind, first=5) == [5, 6]


def test_answers_of_a_test_that_was_stopped_are_not_the_next_ones(pool, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tests.distributed.pool.wait", stop)
        pool.run(rank_behind, first=0)
    assert pool.run(rank_behind, first=5) == [5, 6]


def threads_before_a_mesh_is_used(size: int) -> int:
    # the least of some: one that has ended may be listed for a moment longer
    counts = []
    for _ in range(10):
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        time.sleep(0.01)
    sharded = distribute_tensor(torch.ones(size), init_device_mesh("cpu", (2,)))
    assert (sharded + sharded).full_tensor().sum() == 2 * size
    return min(counts)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are listed elsewhere")
def test_the_threads_of_a_job_end_with_it(pool):
    # a group of gloo has three, which look for news all the time
    _, first, second = (pool.run(threads_before_a_mesh_is_used, size=size) for size in (4, 6, 8))
    assert first == second
