"""An optimizer of another package is named in the settings like our own."""

import sys

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.core.registry import plugin_versions
from bessemer.model.storage.folder import load_model
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.optim.registry import GROUP
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from tests.plugin_package import install

CODE = """
import torch

from bessemer.core.registry import Plugin


def build(groups, config):
    return torch.optim.RMSprop(groups, momentum=config.momentum)


PLUGIN = Plugin("rmsprop", "RMSprop for all parameters", build)
FORGETFUL = Plugin("forgetful", "Updates the first group alone", lambda groups, config: torch.optim.SGD(groups[:1]))
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    places = {"rmsprop": "plugged_optimizer:PLUGIN", "forgetful": "plugged_optimizer:FORGETFUL"}
    (tmp_path / "installed").mkdir()
    install(tmp_path / "installed", monkeypatch, "plugged_optimizer", CODE, {GROUP: places})
    yield
    sys.modules.pop("plugged_optimizer", None)


def test_it_trains_a_model(settings, model_folder, tokenized, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    config = settings.with_changes(optimizer="rmsprop", learning_rate=1e-3, steps=6, evaluate_tokens=64, sample_points=0)
    pretrain(config, model_folder, tokenized / "tokens", out, seed=1, device="cpu")
    losses = [record["loss"] for record in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    before, after = load_model(model_folder), load_model(out / "model")
    assert not any(torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))


def test_its_package_and_version_belong_to_the_stages_identity(settings):
    config = settings.with_changes(optimizer="rmsprop")
    assert plugin_versions(config.plugins()) == {f"{GROUP}:rmsprop": "plugged_optimizer 1.2"}


def test_a_misspelt_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"there is no optimizer 'rmsprob'; did you mean 'rmsprop'\?"):
        PretrainConfig.parse({"steps": 1, "optimizer": "rmsprob"}, "pretrain")


def test_one_that_leaves_parameters_out_is_refused(decoder, settings):
    with pytest.raises(ConfigError, match=r"forgetful: .* each must be moved by one optimizer"):
        build_optimizers(decoder, settings.with_changes(optimizer="forgetful"))
