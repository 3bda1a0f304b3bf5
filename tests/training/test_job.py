"""A training job, from a model's folder to the trained one."""

import pytest

from bessemer.core.hashing import derive_seed
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import TokenBatches
from bessemer.training.job import RunContext, TrainingHooks, TrainingJob


@pytest.fixture
def job(model_folder, settings, tmp_path):
    config = settings.with_changes(steps=2, diagnostics_every=0)
    return TrainingJob.open(config, model_folder, RunContext(tmp_path, seed=1, device="cpu"), description="train")


@pytest.fixture
def source(tokenized, job):
    config = job.config
    shards = TokenShards(tokenized / "tokens" / "train")
    return TokenBatches(
        shards, batch_size=config.batch_size, context_length=config.context_length, seed=derive_seed(1, "batches")
    )


def test_a_job_trains_once_and_leaves_a_model(job, source, tmp_path):
    assert job.train(source)["steps"] == 2
    load_model(tmp_path / "model")
    with pytest.raises(AssertionError, match="a job trains once"):
        job.train(source)


def test_hooks_change_the_weights_before_the_first_step_and_measure_after_each(job, source):
    seen = []

    def validate(decoder):
        seen.append(float(decoder.norm.weight.detach()[0]))
        return lambda finished, trainer: {"finished": finished}

    hooks = TrainingHooks(validate, initialise=lambda decoder: decoder.norm.weight.data.fill_(2.0))
    assert job.train(source, hooks=hooks)["finished"] == 2 and seen == [2.0]
