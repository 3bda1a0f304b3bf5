"""Functions of the user's own in the stages that train, through a real recipe."""

import shutil

import pytest
import torch

from bessemer.core.metrics import read_metrics
from bessemer.model.storage.folder import load_model
from bessemer.pipeline.api import run

RECIPE = """
format: 1
name: own
seed: 1
collect: [{source: files, paths: texts}]
tokenize: {vocab_size: 270}
model: {preset: null, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1,
        head_dim: 16, intermediate_size: 16, max_position_embeddings: 32}
pretrain: {optimizer: "own.py:still", steps: 2, batch_size: 2, context_length: 16, dtype: float32, compile: false,
           evaluate_tokens: 64, sample_points: 0}
"""
OWN = """
import torch
from bessemer.training.objectives import next_token_loss

def twice(model, batch):
    return 2 * next_token_loss(model, batch)

def still(groups):
    assert {"others", "matrices"} == {group["role"] for group in groups}
    return torch.optim.SGD(groups, lr=0.0)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The stages before `pretrain`, made once and copied by each test."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for number in range(200):
        (folder / "texts" / f"{number}.txt").write_text(
            f"Text number {number} says that {number} is a number. " * 4, encoding="utf-8"
        )
    (folder / "own.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("own.yaml", until="model", allow_code=True)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "own", symlinks=True)
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def test_an_optimizer_in_a_recipe_trains_and_an_edited_one_trains_again(folder):
    weights = {}
    for rate in ("0.0", "0.5"):
        # a group's own rate counts, not the optimizer's: the function says what it wants
        (folder / "own.py").write_text(
            OWN.replace("SGD(groups", 'SGD([g | {"lr": 0.0} for g in groups]').replace("0.0", rate), encoding="utf-8"
        )
        done = run("own.yaml", allow_code=True)
        before = load_model(next((done.folder / "stages" / "model").resolve().glob("model")))
        after = load_model(done.folder / "model")
        weights[rate] = torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)
    assert weights == {"0.0": True, "0.5": False}


def test_a_loss_and_an_optimizer_in_one_recipe_are_what_is_trained_with(folder):
    losses = [
        [record["loss"] for record in read_metrics(run("own.yaml", overrides, allow_code=True).folder / "metrics.jsonl")]
        for overrides in ({}, {"pretrain.loss": "own.py:twice"})
    ]
    # the optimizer stands still, so both see the same weights
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]]) and len(losses[0]) == 2
