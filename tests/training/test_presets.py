"""A recipe's `model: {preset: …}` trains, whatever the architecture."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.metrics import read_metrics
from bessemer.model.config import ModelStageConfig
from bessemer.model.stage import build_model
from bessemer.model.storage.folder import load_model
from bessemer.training.pretrain import pretrain
from tests.cases import slow


@pytest.mark.parametrize("preset", ["hybrid-3m", *map(slow, ("mla-3m", "gpt2-3m", "moe-3m"))])
def test_a_small_preset_trains_every_weight(settings, tokenized, tmp_path, preset):
    (tmp_path / "run").mkdir()
    build_model(ModelStageConfig.parse({"preset": preset}), tokenized / "tokenizer", tmp_path, seed=1)
    config = settings.with_changes(steps=2, evaluate_tokens=64)
    pretrain(config, tmp_path / "model", tokenized / "tokens", tmp_path / "run", seed=1, device="cpu")
    before, after = load_model(tmp_path / "model"), load_model(tmp_path / "run" / "model")
    assert after.config == before.config
    still = [name for name, tensor in after.state_dict().items() if torch.equal(tensor, before.state_dict()[name])]
    assert still == []
    steps = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert steps and all(loss < 10 for loss in steps)
