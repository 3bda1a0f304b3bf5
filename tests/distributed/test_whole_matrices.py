"""Ranks that hold shards of matrices share Muon's products: each computes some of them, and gets its shard of every result."""

import math
from functools import cache

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from bessemer.training.optim import muon
from bessemer.training.optim.registry import newton_schulz_flops
from tests.cases import slow_but

from .parity import TWO_LAYERS, assert_equal, trained
from .test_optimizers import PLACEMENTS, random

EXACT = 1e-9
#: Eight matrices; four experts, each a gate over an up projection, and a down projection.
PLAIN = [(16, 12)] * 6 + [(12, 40)] * 2
GATED, DOWN = (4, 16, 6), (4, 6, 8)
#: Matrices that one process orthogonalises.
MATRICES = len(PLAIN) + 4 * 2 + 4


#: The layouts on four ranks.
LAYOUTS = [layout for layout, (sizes, _) in PLACEMENTS.items() if math.prod(sizes) == 4]


def stepped(layout=None, steps=2):
    """Of this rank: matrices that it orthogonalised in a step, their FLOPs, and the most elements at once; and the weights."""
    sizes, placements = PLACEMENTS.get(layout, ((), []))
    mesh = init_device_mesh("cpu", sizes) if layout else None
    calls = []

    def place(shape, seed):
        tensor = random(shape, seed)
        return tensor if mesh is None else distribute_tensor(tensor, mesh, placements)

    def counted(matrices, dtype):
        calls.append(tuple(matrices.shape))
        return orthogonalised(matrices, dtype)

    parameters = [torch.nn.Parameter(place(shape, seed)) for seed, shape in enumerate([*PLAIN, DOWN, GATED])]
    optimizer = muon.Muon([{"params": parameters[:-1]}, {"params": parameters[-1:], "parts": 2}], lr=0.1)
    orthogonalised, muon.orthogonalised = muon.orthogonalised, counted
    try:
        for step in range(steps):
            for number, parameter in enumerate(parameters):
                parameter.grad = place(parameter.shape, 100 * (step + 1) + number)
            optimizer.step()
    finally:
        muon.orthogonalised = orthogonalised
    weights = [(parameter if mesh is None else parameter.full_tensor()).detach().clone() for parameter in parameters]
    matrices = sum(math.prod(shape[:-2]) for shape in calls)
    return matrices / steps, sum(map(newton_schulz_flops, calls)) / steps, max(map(math.prod, calls)), weights


@pytest.fixture(scope="module")
def shared(four):
    """What each rank computed under a layout, which is computed once."""
    return cache(lambda layout: four.run(stepped, layout=layout))


@pytest.fixture(scope="module")
def whole():
    """The same of one process."""
    return stepped()


@pytest.mark.parametrize("layout", slow_but(["hybrid", "sharded and tensor by columns"], LAYOUTS))
def test_the_work_of_a_rank_falls_by_the_number_of_ranks(shared, whole, layout):
    alone, whole_cost, _, _ = whole
    assert alone == MATRICES
    shares = shared(layout)
    assert [matrices for matrices, *_ in shares] == [MATRICES / 4] * 4
    largest = newton_schulz_flops((12, 40))
    for _, cost, elements, _ in shares:
        assert abs(cost - whole_cost / 4) <= largest
        assert elements <= 12 * 40


@pytest.mark.parametrize("layout", slow_but(["hybrid", "sharded and tensor by columns"], LAYOUTS))
def test_shared_products_give_the_weights_of_one_process(shared, whole, layout):
    expected = whole[-1]
    for *_, found in shared(layout):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_shared_products_give_the_same_bits_in_every_run_and_on_every_rank(four, shared):
    first, *others = [weights for run in (shared("hybrid"), four.run(stepped, layout="hybrid")) for *_, weights in run]
    for weights in others:
        assert all(map(torch.equal, first, weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2},
        {"data_replicate": 2},
        {"data_shard": 4},
        {"pipeline": 2},
        {"pipeline": 2, "data_replicate": 2},
    ],
    ids=str,
)
def test_a_run_with_muon_is_that_of_one_process(four, alone, parallel):
    options = {"settings": {"optimizer": "muon"}, "model": TWO_LAYERS | {"intermediate_size": 66}}
    assert_equal(four.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)
