"""The collectives of the project's own step, on fake process groups, beside the formulas."""

import pytest
import torch

from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.scaling.hardware import find_card
from bessemer.scaling.job import Candidate, PlannedJob
from bessemer.scaling.timing import Traffic, traffic
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow
from tests.distributed.parity import DENSE, SETTINGS, RandomBatches

from .counting import CountingCollectives, fake_ranks

#: Every dimension that is cut is a multiple of 1,024, so that nothing is filled up.
WIDE = DENSE | {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 32,
    "intermediate_size": 1024,
    "qk_norm": "none",
}
#: Of heads wide enough that the gradient of their norm is more than a few numbers.
HEADS = DENSE | {"head_dim": 16}
EXPERTS = HEADS | {
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "router_aux_loss_coef": 0.1,
}


def counted_and_planned(ranks, parallel, model=DENSE, rows=1, micro_batch_size=None, changes=None):
    """Both as (operation, ranks) → (number, bytes of the whole tensors), for rank 0."""
    layout = Layout.of(ParallelConfig(**parallel), ranks)
    values = SETTINGS | {"parallel": parallel, "batch_size": layout.data_ranks * rows}
    values |= {"micro_batch_size": micro_batch_size} | (changes or {})
    settings, config = PretrainConfig(**values), ModelConfig(**model)
    runtime = Runtime.of(settings, torch.device("cpu"))
    with fake_ranks(ranks):
        mesh = Mesh.of(layout, "cpu")
        part, _ = prepare_model(initial_decoder(config, seed=1), settings, runtime, mesh)
        optimizers = build_optimizers(part, settings)
        trainer = Trainer(
            part, optimizers, next_token_loss, runtime, gradient_clip=1.0, micro_batch_size=micro_batch_size, mesh=mesh
        )
        batch = trainer.read(RandomBatches(settings.batch_size, settings.context_length, config.vocab_size), 0)
        with CountingCollectives() as counter:
            trainer.step(batch)
    planned = {}
    for kind in traffic(
        PlannedJob(config, settings, find_card("cpu")),
        Candidate(layout, micro_batch_size or rows, settings.activation_checkpointing),
    ):
        count, size = planned.get((kind.operation, kind.ranks), (0, 0))
        planned[kind.operation, kind.ranks] = (count + kind.count, size + kind.size)
    return {key: value for key, value in counter.tensors().items() if key[1] > 1}, planned


@pytest.mark.parametrize(
    "ranks, parallel, options",
    [
        (8, {}, {}),
        slow(8, {}, {"rows": 4, "micro_batch_size": 2}),
        slow(8, {"data_replicate": 4}, {}),
        slow(8, {"data_replicate": 8}, {}),
        # wide enough for the shard of the last norm to be more than the numbers that are not counted
        (1024, {"data_replicate": 128}, {"model": DENSE | {"hidden_size": 128}}),
        slow(1024, {}, {"model": WIDE}),
    ],
    ids=["sharded", "in micro-batches", "hybrid", "replicated", "hybrid over 1,024", "sharded over 1,024"],
)
def test_data_parallel_collectives_are_those_planned(ranks, parallel, options):
    counted, planned = counted_and_planned(ranks, parallel, **options)
    assert counted == planned


@pytest.mark.parametrize(
    "ranks, parallel, options",
    [
        (8, {}, {}),
        (8, {"data_replicate": 2}, {"rows": 4, "micro_batch_size": 2}),
        slow(4, {"expert": 2}, {"model": EXPERTS | {"expert_bias": True}}),
    ],
    ids=["sharded", "hybrid, in micro-batches", "experts"],
)
def test_matrices_gathered_in_bfloat16_are_planned(ranks, parallel, options):
    counted, planned = counted_and_planned(ranks, parallel, **options | {"changes": {"dtype": "bfloat16"}})
    for key in planned:
        if key[0] in ("all-gather", "reduce-scatter"):
            assert counted[key] == planned[key], key


@pytest.mark.parametrize(
    "ranks, parallel, options",
    [
        (2, {"tensor": 2}, {"model": HEADS}),
        slow(8, {"tensor": 2}, {"model": HEADS}),
        (2, {"tensor": 2}, {"model": HEADS, "changes": {"activation_checkpointing": "full"}}),
        slow(1024, {"tensor": 8}, {"model": WIDE}),
    ],
    ids=["tensor", "sharded too", "computed again", "of 1,024"],
)
def test_tensor_parallel_collectives_are_those_planned(ranks, parallel, options):
    counted, planned = counted_and_planned(ranks, parallel, **options)
    assert counted == planned


def test_routings_go_with_the_tokens_as_planned():
    counted, planned = counted_and_planned(4, {"tensor": 4}, EXPERTS)
    for operation in ("all-gather", "reduce-scatter"):
        assert counted[operation, 4] == planned[operation, 4]


def test_a_ring_sends_all_but_its_own_share():
    assert Traffic("data", "all-gather", 8, 1, 800.0).sent == 700.0
    assert Traffic("data", "all-reduce", 8, 1, 800.0).sent == 1400.0
    assert Traffic("pipeline", "send", 8, 1, 800.0).sent == 800.0
