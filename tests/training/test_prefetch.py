import threading

import pytest
import torch

from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import Prefetcher


def batch_of(step):
    return Batch(torch.tensor([[step]]), torch.tensor([[step + 1]]))


def test_batches_come_in_order_and_are_those_that_reading_gives():
    with Prefetcher(batch_of, range(3, 40)) as prefetcher:
        for step in range(3, 40):
            assert prefetcher.batch(step).tokens_BT.item() == step


def test_no_more_is_read_ahead_than_allowed():
    asked, third = [], threading.Event()

    def read(step):
        asked.append(step)
        if len(asked) == 3:
            third.set()
        return batch_of(step)

    with Prefetcher(read, range(100), depth=2) as prefetcher:
        prefetcher.batch(0)
        assert third.wait(10)
    assert asked == [0, 1, 2]


def test_an_error_in_reading_is_raised_where_its_batch_is_asked_for():
    def read(step):
        if step == 2:
            raise OSError("the disk is gone")
        return batch_of(step)

    with pytest.raises(OSError, match="the disk is gone"), Prefetcher(read, range(10)) as prefetcher:
        assert [prefetcher.batch(step).tokens_BT.item() for step in range(2)] == [0, 1]
        prefetcher.batch(2)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_its_end_ends_the_thread(taken):
    with Prefetcher(batch_of, range(5)) as prefetcher:
        for step in range(taken):
            prefetcher.batch(step)
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_its_end_ends_the_thread_when_the_user_fails():
    with pytest.raises(KeyError), Prefetcher(batch_of, range(100)) as prefetcher:
        prefetcher.batch(0)
        raise KeyError
    assert not any(thread.name == "batches" for thread in threading.enumerate())
