"""The orders in which PyTorch's schedules pass micro-batches, timed by hand, beside the planner's formula."""

from collections import Counter

import pytest
import torch

from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import empty_decoder
from bessemer.scaling.timing import bubble_share
from bessemer.scaling.work import Choice
from bessemer.training.config import PretrainConfig
from bessemer.training.prepare import prepare
from bessemer.training.session import Session
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


def idle_over_busy(ranks, schedule, micro_batches):
    """Of the rank that is busiest longest, over a step in which every rank does the next thing in its order as soon as what it
    needs is there."""
    parallel = ParallelConfig(pipeline=ranks, pipeline_schedule=schedule)
    settings = PretrainConfig(**SETTINGS | {"parallel": parallel, "batch_size": micro_batches, "micro_batch_size": 1})
    model = empty_decoder(ModelConfig(**DENSE | {"num_hidden_layers": 2 * ranks}))
    with fake_ranks(ranks):
        mesh = Mesh.of(Layout.of(parallel, ranks), "cpu")
        _, pipeline = prepare(model, settings, Session.of(settings, torch.device("cpu")), mesh)
        kinds = {rank: list(numbered(actions)) for rank, actions in pipeline.schedule.pipeline_order.items()}
    last, done, clock = mesh.layout.stages - 1, {}, dict.fromkeys(kinds, 0)
    busy = sum(_SECONDS[kind] for kind, *_ in kinds[0])
    while any(kinds.values()):
        before = len(done)
        for rank, actions in kinds.items():
            while actions:
                kind, stage, number = actions[0]
                needs = []
                if kind == "F" and stage > 0:
                    needs = [("F", stage - 1, number)]
                elif kind in "BI":
                    needs = [("F", stage, number), *([("I", stage + 1, number)] if stage < last else [])]
                if not all(need in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + _SECONDS[kind]
                done["I" if kind == "B" else kind, stage, number] = clock[rank]
                actions.pop(0)
        assert len(done) > before, "every rank waits for another"
    return (max(clock.values()) - busy) / busy


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8)])
def test_the_bubble_is_that_of_the_formula(schedule, ranks, micro_batches):
    choice = Choice(Layout(pipeline=ranks), 1, schedule=schedule, stages_per_rank=1 if schedule in ("gpipe", "1f1b") else 2)
    assert idle_over_busy(ranks, schedule, micro_batches) == pytest.approx(bubble_share(choice, micro_batches))
