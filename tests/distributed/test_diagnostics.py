"""What one process sees of a step, many see together."""

import pytest
import torch

from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.model_setup import prepare_model
from bessemer.training.monitoring.diagnostics import Diagnostics
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow

from .parity import DENSE, SETTINGS, RandomBatches


class OfTwoSources(RandomBatches):
    def batch(self, step, rows=slice(None), mesh=ALONE):
        from dataclasses import replace

        batch = super().batch(step, rows)
        return replace(batch, sources_BT=(batch.tokens_BT % 2).to(torch.int16), source_names=("even", "odd"))


def diagnosed(parallel=None, tied=False, **changes):
    """The diagnostics of one step."""
    config = PretrainConfig(**(SETTINGS | {"steps": 1, "parallel": parallel or {}} | changes))
    mesh = ALONE if parallel is None else Mesh.here(ParallelConfig(**parallel), "cpu")
    model = initial_decoder(ModelConfig(**DENSE | {"tie_word_embeddings": tied}), seed=3).double()
    runtime = Runtime.of(config, torch.device("cpu"))
    diagnostics = Diagnostics(model, config, mesh)
    parts, pipeline = prepare_model(model, config, runtime, mesh)
    optimizers = build_optimizers(parts, config)
    options = {"gradient_clip": config.gradient_clip, "micro_batch_size": config.micro_batch_size, "mesh": mesh}
    options["pipeline"] = pipeline
    trainer = Trainer(parts, optimizers, next_token_loss, runtime, **options)
    batch = trainer.read(OfTwoSources(config.batch_size, config.context_length, DENSE["vocab_size"]), 0)
    step_diagnostics = diagnostics.of_step(1, trainer, batch)
    trainer.step(batch, step_diagnostics.wrap_accept(lambda loss, norm: True))
    return step_diagnostics.metrics()


@pytest.fixture(scope="module")
def alone():
    return diagnosed()


def assert_same(everyone, alone):
    assert all(metrics == everyone[0] for metrics in everyone)
    kinds = {key.partition("/")[0] for key in alone}
    assert kinds >= {"gradient_norm", "weight_norm", "update_ratio", "activation_outlier", "activation_kurtosis", "loss"}
    assert everyone[0].keys() == alone.keys()
    for key in alone.keys() - {"peak_memory_bytes"}:
        assert everyone[0][key] == pytest.approx(alone[key], rel=2e-5), key


@pytest.mark.parametrize("parallel", [{"data_shard": 2}, slow({"data_replicate": 2})], ids=str)
def test_two_ranks_see_what_one_sees(two, alone, parallel):
    assert_same(two.run(diagnosed, parallel=parallel, micro_batch_size=3), alone)


@pytest.mark.parametrize("schedule", ["zbv", slow("1f1b")])
def test_two_stages_see_what_one_process_sees(two, alone, schedule):
    assert_same(two.run(diagnosed, parallel={"pipeline": 2, "pipeline_schedule": schedule}), alone)


def test_a_table_that_two_stages_hold_counts_once(two):
    assert_same(two.run(diagnosed, parallel={"pipeline": 2}, tied=True), diagnosed(tied=True))


@pytest.mark.parametrize("axis", [slow("tensor"), "context"])
def test_ranks_that_share_matrices_or_rows_see_whole_ones(two, alone, axis):
    assert_same(two.run(diagnosed, parallel={axis: 2}, micro_batch_size=3), alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2, "pipeline": 2}, {"data_replicate": 2, "data_shard": 2}], ids=str)
def test_four_ranks_see_what_one_sees(four, alone, parallel):
    assert_same(four.run(diagnosed, parallel=parallel), alone)
