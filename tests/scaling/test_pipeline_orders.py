"""The orders in which PyTorch's schedules pass micro-batches, timed by hand, beside the planner's formulas."""

from collections import Counter

import pytest
import torch

from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import empty_decoder
from bessemer.scaling.job import Candidate
from bessemer.scaling.memory import micro_batches_in_flight
from bessemer.scaling.timing import bubble_share
from bessemer.training.model_setup import prepare_model
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.distributed.parity import DENSE, SETTINGS

from .counting import fake_ranks

#: Of one stage and micro-batch: forward, backward, and the backward's halves, of the states and of the weights.
_SECONDS = {"F": 1, "B": 2, "I": 1, "W": 1}


def numbered(actions):
    """(kind, stage, micro-batch) of a rank's computations. Counted anew: on the last rank of 1f1b what PyTorch shows, and does
    not follow, begins at 1."""
    seen = Counter()
    for action in filter(None, actions):
        kind, stage = action.computation_type.value, action.stage_index
        if kind in _SECONDS:
            yield kind, stage, seen[kind, stage]
            seen[kind, stage] += 1


def orders(ranks, schedule, micro_batches):
    """What each rank computes in a step, in order; and the layout."""
    parallel = ParallelConfig(pipeline=ranks, pipeline_schedule=schedule)
    settings = PretrainConfig(**SETTINGS | {"parallel": parallel, "batch_size": micro_batches, "micro_batch_size": 1})
    model = empty_decoder(ModelConfig(**DENSE | {"num_hidden_layers": 2 * ranks}))
    layout = Layout.of(parallel, ranks)
    with fake_ranks(ranks):
        _, pipeline = prepare_model(model, settings, Runtime.of(settings, torch.device("cpu")), Mesh.of(layout, "cpu"))
    return {rank: list(numbered(actions)) for rank, actions in pipeline.schedule.pipeline_order.items()}, layout


def idle_over_busy(ranks, schedule, micro_batches):
    """Of a step in which every rank does the next thing in its order as soon as what it needs is there."""
    left, layout = orders(ranks, schedule, micro_batches)
    busy = sum(_SECONDS[kind] for kind, *_ in left[0])
    done, clock = {}, dict.fromkeys(left, 0)
    while any(left.values()):
        before = len(done)
        for rank, actions in left.items():
            while actions:
                kind, stage, number = actions[0]
                needs = []
                if kind == "F" and stage > 0:
                    needs = [("F", stage - 1, number)]
                elif kind in "BI":
                    needs = [("F", stage, number), *([("I", stage + 1, number)] if stage < layout.stages - 1 else [])]
                if not all(need in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + _SECONDS[kind]
                done["I" if kind == "B" else kind, stage, number] = clock[rank]
                actions.pop(0)
        assert len(done) > before, "every rank waits for another"
    return (max(clock.values()) - busy) / busy


def candidate(ranks, schedule):
    return Candidate(Layout(pipeline=ranks), 1, schedule=schedule, stages_per_rank=1 if schedule in ("gpipe", "1f1b") else 2)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8)])
def test_the_bubble_is_that_of_the_formula(schedule, ranks, micro_batches):
    planned = bubble_share(candidate(ranks, schedule), micro_batches)
    assert idle_over_busy(ranks, schedule, micro_batches) == pytest.approx(planned)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
def test_as_many_micro_batches_are_held_at_once_as_planned(schedule):
    found, layout = orders(4, schedule, 8)
    for rank, actions in found.items():
        held = most = 0
        for kind, *_ in actions:
            held += (kind == "F") - (kind in "BW")
            most = max(most, held)
        assert most / layout.stages_per_rank == micro_batches_in_flight(candidate(4, schedule), 8, rank)
