"""A run that goes on from another's checkpoint."""

import shutil
from functools import partial

import pytest
import torch

from bessemer.core.errors import CheckpointError, ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.model.storage.folder import load_model
from bessemer.training.checkpoint.export import checkpoint_model, find_checkpoint
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig


@pytest.fixture(scope="module")
def stable():
    """Settings of a run that never decays, so that its middle does not depend on its end."""
    return PretrainConfig(
        steps=4,
        batch_size=2,
        context_length=32,
        dtype="float32",
        compile=False,
        threads=1,
        warmup_fraction=0.0,
        decay_fraction=0.0,
        checkpoint_every=2,
        sample_points=0,
        evaluate_tokens=200,
    )


@pytest.fixture(scope="module")
def run_in(model_folder, tokenized):
    def run_in(folder, name, config):
        (folder / name).mkdir(exist_ok=True)
        pretrain(config, model_folder, tokenized / "tokens", folder / name, seed=3, device="cpu", folder=folder)
        return folder / name

    return run_in


@pytest.fixture(scope="module")
def made(run_in, stable, tmp_path_factory):
    """A run of those settings, made once and copied by each test."""
    return run_in(tmp_path_factory.mktemp("made"), "stable", stable)


@pytest.fixture
def run(run_in, made, tmp_path):
    """Another run beside a finished one, `stable`."""
    shutil.copytree(made, tmp_path / "stable")
    return partial(run_in, tmp_path)


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_more_steps_of_a_finished_run_are_those_of_one_long_run_to_the_bit(run, stable):
    prolonged = run("prolonged", stable.with_changes(steps=7, init_from="stable@last"))
    assert [record["step"] for record in read_metrics(prolonged / "metrics.jsonl")] == [5, 6, 7]
    assert weights(prolonged) == weights(run("long", stable.with_changes(steps=7)))


def test_a_decay_branches_off_a_step_that_was_kept(run, stable):
    decayed = run("decayed", stable.with_changes(init_from="stable@2", decay_fraction=0.5))
    rates = [record["learning_rate"] for record in read_metrics(decayed / "metrics.jsonl")]
    assert rates == pytest.approx([stable.learning_rate, stable.learning_rate / 2])


def test_a_step_that_was_not_kept_is_named_with_those_that_were(run, tmp_path):
    with pytest.raises(ConfigError, match=r"stable kept no checkpoint of step 1; it kept 2, 3, 4|it kept 2, 4"):
        find_checkpoint("stable@1", tmp_path)
    for wrong in ("stable", "stable@x", "@2"):
        with pytest.raises(ConfigError, match="is not a RUN@STEP"):
            find_checkpoint(wrong, tmp_path)
    with pytest.raises(ConfigError, match="nothing: holds no checkpoints"):
        find_checkpoint("nothing@2", tmp_path)


def test_another_optimizer_and_too_few_steps_are_refused(run, stable):
    with pytest.raises(CheckpointError, match="of another optimizer"):
        run("other", stable.with_changes(init_from="stable@last", steps=9, optimizer="adamw"))
    with pytest.raises(ConfigError, match="is at step 4; steps must be larger"):
        run("few", stable.with_changes(init_from="stable@last"))


def test_the_model_of_a_checkpoint_is_the_one_it_was(run, tmp_path):
    model, _ = checkpoint_model(find_checkpoint("stable@last", tmp_path))
    expected = load_model(tmp_path / "stable" / "model").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
