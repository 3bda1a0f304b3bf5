import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.training.data import packing
from bessemer.training.data.packing import RowPlan, best_fit, pack
from tests.training.shards import random_documents, write_shards

CAPACITY = 50
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=80)


def one_by_one(lengths, capacity):
    """Best-fit decreasing as it is defined: a row for each item in turn."""
    rows = [0] * len(lengths)
    room, opened = [], 0
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect.bisect_left(room, (lengths[item], -1))
        left, row = room.pop(place) if place < len(room) else (capacity, opened)
        opened = max(opened, row + 1)
        rows[item] = row
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], row))
    return rows


@settings(deadline=None)
@given(LENGTHS)
def test_rows_are_those_of_placing_one_item_after_another(lengths):
    assert best_fit(lengths, CAPACITY).tolist() == one_by_one(lengths, CAPACITY)


@settings(deadline=None)
@given(LENGTHS)
def test_no_row_holds_too_much_and_no_two_are_half_empty(lengths):
    used = np.bincount(best_fit(lengths, CAPACITY), weights=lengths)
    assert (used <= CAPACITY).all() and (used > 0).all()
    assert (used <= CAPACITY / 2).sum() <= 1  # two would have been one


def test_the_fullest_row_that_fits_is_chosen():
    assert best_fit([6, 5, 4, 3, 2], 10).tolist() == [0, 1, 0, 1, 1]


def packed(lengths, capacity, added=0):
    lengths = np.array(lengths, np.int64)
    nothing = np.zeros(len(lengths), np.int16)
    return pack(np.cumsum(lengths) - lengths, lengths, nothing, capacity, np.full(len(lengths), added))


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(4, 100), st.integers(0, 3))
def test_every_token_is_in_one_piece_and_next_to_none_of_the_rows_is_empty(lengths, capacity, added):
    pieces = packed(lengths, capacity, added)
    tokens = [np.arange(start, start + length) for start, length in zip(pieces.starts, pieces.lengths, strict=True)]
    assert np.array_equal(np.sort(np.concatenate(tokens)), np.arange(sum(lengths)))
    begins = np.cumsum(lengths)
    assert all(np.searchsorted(begins, one[0], "right") == np.searchsorted(begins, one[-1], "right") for one in tokens)
    used = np.bincount(pieces.rows, weights=pieces.lengths + added)
    assert (used > 0).all() and (used <= capacity).all()
    if not added:  # what a piece is followed by is no waste, but cutting makes more of it
        assert len(used) * capacity - used.sum() <= 0.005 * len(used) * capacity + capacity


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["lognormal", "pareto", "half rows", "one length"]),
    st.integers(0, 2**32),
    st.integers(128, 4096),
    st.floats(0.3, 2.0),
)
def test_less_than_one_percent_is_wasted_whatever_the_lengths(shape, seed, capacity, spread):
    draw = np.random.default_rng(seed)
    lengths = {
        "lognormal": lambda: np.exp(draw.normal(np.log(capacity / 3), spread, 4000)),
        "pareto": lambda: (1 + draw.pareto(1 + spread, 4000)) * capacity / 8,
        "half rows": lambda: draw.uniform(0.45, 0.75, 4000) * capacity,
        "one length": lambda: np.full(4000, draw.uniform(0.05, 1) * capacity),
    }[shape]()
    lengths = np.clip(lengths, 1, 50 * capacity).astype(np.int64)
    pieces = packed(lengths, capacity)
    assert 1 - lengths.sum() / ((pieces.rows.max() + 1) * capacity) < 0.01


def test_a_document_that_fits_a_row_is_not_cut_where_little_is_lost_without():
    lengths = np.clip(np.random.default_rng(1).lognormal(5, 1, 5000), 1, 10_000).astype(np.int64)
    pieces = packed(lengths, 1024)
    assert len(pieces.lengths) == np.ceil(lengths / 1024).sum()


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr("bessemer.tokenization.shards._ROWS_PER_GROUP", 8)
    monkeypatch.setattr(packing, "_LEAST_ROWS", 4)
    lengths = np.random.default_rng(2).integers(0, 60, 70)
    return write_shards(tmp_path / "shards", random_documents(lengths))


def rows_of(plan):
    return [[column.tolist() for column in plan.row(number)] for number in range(plan.rows)]


def test_a_plan_made_in_parts_holds_every_token_once(shards):
    plan = RowPlan(shards, 32)
    places = [
        (start, start + length) for starts, lengths, _ in rows_of(plan) for start, length in zip(starts, lengths, strict=True)
    ]
    tokens = sorted(token for place in places for token in range(*place))
    assert tokens == list(range(shards.tokens - 1))
    assert plan.filled == len(tokens) / (plan.rows * 32)


def test_a_plan_on_disk_is_made_once_and_is_the_one_in_memory(shards, tmp_path, monkeypatch):
    in_memory = rows_of(RowPlan(shards, 32))
    assert rows_of(RowPlan(shards, 32, scratch=tmp_path / "scratch")) == in_memory
    monkeypatch.setattr(packing, "pack", None)
    assert rows_of(RowPlan(shards, 32, scratch=tmp_path / "scratch")) == in_memory


def test_plans_of_other_rows_have_other_fingerprints(shards):
    plans = [RowPlan(shards, 32), RowPlan(shards, 33), RowPlan(shards, 32, reserved=3)]
    plans.append(RowPlan(shards, 32, reserved=3, reserved_sources=[]))
    assert len({plan.fingerprint for plan in plans}) == 4
