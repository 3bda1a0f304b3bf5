"""Every way to spread a step over processes gives the step of one process."""

import pytest

from tests.cases import slow

from .parity import TWO_LAYERS, assert_equal, trained

EXACT = 1e-9


@pytest.mark.parametrize(
    "parallel, settings",
    [
        ({"data_replicate": 2}, {}),
        ({"data_shard": 2}, {"micro_batch_size": 3}),
        slow({"data_replicate": 2}, {"micro_batch_size": 1}),
        slow({"data_replicate": 2}, {"micro_batch_size": 3}),
        slow({"data_shard": 2}, {}),
        slow({"data_shard": 2}, {"micro_batch_size": 1}),
    ],
    ids=str,
)
def test_two_ranks_are_one(two, alone, parallel, settings):
    options = {"model": TWO_LAYERS, "settings": settings}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize(
    "parallel", [{"data_replicate": 2, "data_shard": 2}, slow({"data_replicate": 4}), slow({"data_shard": 4})], ids=str
)
def test_four_ranks_are_one(four, alone, parallel):
    assert_equal(four.run(trained, parallel=parallel, model=TWO_LAYERS)[0], alone(model=TWO_LAYERS), EXACT)


def test_tied_embeddings_are_one_parameter(two, alone):
    model = TWO_LAYERS | {"tie_word_embeddings": True}
    assert_equal(two.run(trained, parallel={}, model=model)[0], alone(model=model), EXACT)
