import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.training.data.token_stream import permuted


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_every_position_comes_once(size, seed):
    assert sorted(permuted(np.arange(size), size, seed)) == list(range(size))


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_a_trillion_positions_need_no_table(seed):
    size = 10**12
    chosen = permuted(np.arange(1000) + 10**11, size, seed)
    assert len(set(chosen.tolist())) == 1000
    assert chosen.min() >= 0 and chosen.max() < size


def test_neighbours_are_scattered_evenly():
    size = 100_000
    chosen = permuted(np.arange(2000), size, 7)
    counts, _ = np.histogram(chosen, bins=10, range=(0, size))
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200))
    assert np.mean(np.diff(chosen) > 0) < 0.56


def test_another_seed_gives_another_order():
    assert not np.array_equal(permuted(np.arange(50), 50, 1), permuted(np.arange(50), 50, 2))


def test_the_order_is_the_one_that_runs_were_started_with():
    assert permuted(np.arange(12), 12, 1).tolist() == [3, 2, 8, 4, 7, 11, 0, 5, 6, 10, 9, 1]
