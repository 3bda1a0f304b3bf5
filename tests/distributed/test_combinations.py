"""Several axes at once, and single precision: every layout of four and of eight ranks gives the step of one process."""

import pytest
import torch

from tests.cases import slow_but

from .parity import assert_equal, shallowest, trained
from .pool import pool_of

EXACT = 1e-9
#: One Adam step turns 1e-7 of gradient noise into 3e-4 of weight difference; SGD keeps it as it is.
SINGLE = {"dtype": torch.float32, "settings": {"optimizer": "sgd", "learning_rate": 0.1}}

AXES = [
    {"data_replicate": 2, "data_shard": 2},
    {"data_shard": 2, "tensor": 2},
    {"data_shard": 2, "pipeline": 2},
    {"data_shard": 2, "context": 2},
    {"data_shard": 2, "context": 2, "context_method": "ring"},
    {"context": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zero_bubble"},
]
THREE_AXES = [
    {"data_shard": 2, "pipeline": 2, "tensor": 2},
    {"data_shard": 2, "context": 2, "tensor": 2},
    {"context": 2, "pipeline": 2, "tensor": 2, "context_method": "ring"},
    {"data_replicate": 2, "data_shard": 2, "pipeline": 2, "pipeline_schedule": "interleaved"},
]


eight = pool_of(8, "module")


@pytest.mark.parametrize("parallel", slow_but([{"context": 2, "tensor": 2}], AXES[-3:]), ids=str)
def test_two_axes_are_one_process(four, alone, parallel):
    model = shallowest(parallel)
    assert_equal(four.run(trained, parallel=parallel, model=model)[0], alone(model=model), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", THREE_AXES, ids=str)
def test_three_axes_are_one_process(eight, alone, parallel):
    assert_equal(eight.run(trained, parallel=parallel)[0], alone(), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", slow_but([{"data_shard": 2, "pipeline": 2}], AXES), ids=str)
def test_in_single_precision_too(four, alone, parallel):
    model = shallowest(parallel) | {"tie_word_embeddings": True}
    assert_equal(four.run(trained, parallel=parallel, model=model, **SINGLE)[0], alone(model=model, **SINGLE), 1e-5)
