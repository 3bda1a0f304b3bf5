"""A model cut into stages learns as a whole one does, in every order in which its micro-batches may pass."""

import pytest
import torch

from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow, slow_but

from .parity import DENSE, SETTINGS, TWO_LAYERS, RandomBatches, assert_equal, shallowest, trained

EXACT = 1e-9
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
TIED = {"tie_word_embeddings": True}
MIXTURE = TIED | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
}


@pytest.mark.parametrize("schedule", slow_but(["1f1b", "zbv"], SCHEDULES))
def test_two_stages_of_packed_documents_are_one_model(two, alone, schedule):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    options = {"model": shallowest(parallel), "packed": True, "settings": {"micro_batch_size": 2}}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize("schedule", [slow("1f1b"), "zbv"])
def test_tied_embeddings_learn_at_both_ends(two, alone, schedule):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    options = {"model": shallowest(parallel) | TIED, "settings": {"micro_batch_size": 2}}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize("schedule", slow_but(["1f1b"], SCHEDULES[1:]))
def test_routers_of_every_stage_learn_from_their_losses(two, alone, schedule):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    # a router's loss is not the sum of its micro-batches'
    options = {"model": shallowest(parallel) | MIXTURE, "settings": {"micro_batch_size": 2}}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize("schedule", ["1f1b", slow("zero_bubble"), slow("zbv")])
def test_blocks_that_predict_further_ahead_read_the_first_stages_embedding(two, alone, schedule):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    model = shallowest(parallel) | TIED | {"num_nextn_predict_layers": 2}
    options = {"model": model, "settings": {"micro_batch_size": 2}}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize(
    "schedule, settings",
    [
        ("zero_bubble", {"activation_checkpointing": "full"}),
        slow("interleaved", {"activation_checkpointing": "selective"}),
        slow("zbv", {"activation_checkpointing": "full"}),
        slow("1f1b", {"compile": True}),
        slow("interleaved", {"compile": True, "activation_checkpointing": "full"}),
    ],
)
def test_blocks_are_computed_again_and_compiled(two, alone, schedule, settings):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    options = {"model": shallowest(parallel), "settings": settings | {"micro_batch_size": 2}}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(model=options["model"]), EXACT)


@pytest.mark.parametrize("kind, schedule", [("bfloat16", "1f1b"), slow("float16", "zero_bubble")])
def test_products_of_half_precision_are_those_of_one_process(two, alone, kind, schedule):
    settings = {"dtype": kind, "optimizer": "sgd", "micro_batch_size": 2}
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    options = {"model": shallowest(parallel), "settings": settings, "dtype": torch.float32}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), 1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 4},
        slow({"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zero_bubble"}),
        slow({"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zbv"}),
        slow({"pipeline": 2, "context": 2, "pipeline_schedule": "interleaved"}),
        *(slow({"pipeline": 2, "data_replicate": 2, "pipeline_schedule": schedule}) for schedule in SCHEDULES),
        *(
            slow({"pipeline": 4, "pipeline_schedule": schedule, "stages_per_rank": 1})
            for schedule in ("gpipe", "interleaved", "zero_bubble")
        ),
    ],
    ids=lambda parallel: " ".join(f"{name} {value}" for name, value in parallel.items()),
)
def test_four_ranks_are_one(four, alone, parallel):
    options = {"model": shallowest(parallel) | TIED, "settings": {"micro_batch_size": 2}}
    assert_equal(four.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


def scored(parallel=None, model=DENSE | TIED, **settings):
    """Σ −log p of a batch before a step and after it, on every rank."""
    config = PretrainConfig(**(SETTINGS | settings | {"parallel": parallel or {}}))
    mesh = ALONE if parallel is None else Mesh.here(ParallelConfig(**parallel), "cpu")
    runtime = Runtime.of(config, torch.device("cpu"))
    parts, pipeline = prepare_model(initial_decoder(ModelConfig(**model), seed=3).double(), config, runtime, mesh)
    options = {"gradient_clip": config.gradient_clip, "mesh": mesh, "pipeline": pipeline}
    trainer = Trainer(parts, build_optimizers(parts, config), next_token_loss, runtime, **options)
    batches = RandomBatches(config.batch_size, config.context_length, model["vocab_size"])
    held_out = batches.batch(100)
    found = []
    for number in range(2):
        with runtime.evaluating(parts):
            found += [trainer.negative_log_likelihood(held_out.tokens_BT[:4], held_out.targets_BT[:4]) for _ in range(2)]
        trainer.step(trainer.read(batches, number))
    return found


@pytest.mark.parametrize("schedule", ["zbv", slow("1f1b"), slow("interleaved")])
def test_validation_passes_through_the_stages(two, schedule):
    expected = scored()
    assert expected[0] == expected[1] != expected[2]
    for found in two.run(scored, parallel={"pipeline": 2, "pipeline_schedule": schedule}):
        assert found == pytest.approx(expected, rel=EXACT)


@pytest.mark.slow
def test_validation_passes_through_stages_of_several_ranks(four):
    expected = scored(model=TWO_LAYERS | TIED)
    for found in four.run(scored, parallel={"pipeline": 2, "data_shard": 2}, model=TWO_LAYERS | TIED):
        assert found == pytest.approx(expected, rel=EXACT)
