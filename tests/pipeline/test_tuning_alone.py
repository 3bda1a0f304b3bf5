"""A recipe may begin at an existing model and hold nothing but tuning."""

import json

import pytest

import bessemer
from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.folder import save_model
from bessemer.model.initialisation import initial_decoder
from bessemer.pipeline.recipe import load_recipe
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

LOOP = "steps: 2, batch_size: 2, context_length: 64, dtype: float32, compile: false, diagnostics_every: 0, threads: 1"


@pytest.fixture
def folder(tmp_path):
    """A model, and conversations beside it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = ModelConfig(vocab_size=VOCAB_SIZE, intermediate_size=48, max_position_embeddings=64, **shape)
    save_model(initial_decoder(config, seed=1), tmp_path / "base", tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "completion": f"{n}!"} for n in range(12)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_recipe(folder, tuning):
    path = folder / "recipe.yaml"
    path.write_text(f"format: 1\nname: tuned\nmodel: {{init_from: base}}\n{tuning}\n")
    return str(path)


def test_a_recipe_begins_at_an_existing_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = bessemer.run(write_recipe(folder, f"sft: {{data: [chat.jsonl], adapter: {{rank: 2}}, {LOOP}}}"))
    assert (run.folder / "adapter" / "adapter_config.json").exists() and (run.folder / "model" / "config.json").exists()


def test_a_stage_behind_one_that_merges_nothing_is_refused_before_anything_runs(folder):
    first = f"sft: {{data: [chat.jsonl], adapter: {{rank: 2, merge: false}}, {LOOP}}}"
    second = f"again: {{kind: sft, data: [chat.jsonl], {LOOP}}}"
    with pytest.raises(ConfigError, match=r"again: needs model of sft: it writes an adapter alone; set adapter.merge"):
        load_recipe(write_recipe(folder, f"{first}\n{second}"))


def test_text_cannot_be_mixed_in_where_there_is_none(folder):
    with pytest.raises(ConfigError, match="pretraining_share mixes in text of the run's tokens, and no stage above makes any"):
        load_recipe(write_recipe(folder, f"sft: {{data: [chat.jsonl], pretraining_share: 0.1, {LOOP}}}"))
