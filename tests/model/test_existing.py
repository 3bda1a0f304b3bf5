from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig, ModelStageConfig
from bessemer.model.stage import build_model, existing_fingerprint
from bessemer.model.storage.folder import load_model, save_model
from bessemer.pipeline.api import execute, prepare
from bessemer.pipeline.recipe import load_recipe
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.randomised import random_decoder
from tests.model.tokenizers import write_small_tokenizer
from tests.pipeline.test_tokenize import _RECIPE, here  # noqa: F401

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4}


@pytest.fixture
def trained(tmp_path):
    """A model's folder, as if it had been trained."""
    write_small_tokenizer(tmp_path / "tokenizer")
    vocabulary = load_tokenizer(tmp_path / "tokenizer")
    config = ModelConfig(**SMALL, vocab_size=vocabulary.vocab_size, bos_token_id=vocabulary.bos_id, eos_token_id=None)
    save_model(random_decoder(config), tmp_path / "trained", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "trained"


def build(trained, out="out", **settings):
    config = ModelStageConfig.parse({"init_from": trained.name, **settings}, "model")
    (trained.parent / out).mkdir()
    build_model(config, trained.parent / "tokenizer", trained.parent / out, seed=1, folder=trained.parent)
    return load_model(trained.parent / out / "model")


def test_the_weights_and_settings_are_those_of_the_model(trained):
    before, after = load_model(trained), build(trained)
    assert after.config == before.config
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def test_a_model_is_made_to_read_further_with_the_same_weights(trained):
    before, after = load_model(trained), build(trained, max_position_embeddings=64, rope_scaling=YARN)
    assert after.config.rope_scaling.original_max_position_embeddings == 16
    assert after.config.model_type == before.config.model_type == "qwen3"
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    text_BT = torch.arange(64)[None]
    with pytest.raises(ValueError, match="exceed"):
        before(text_BT)
    with torch.no_grad():
        assert after(text_BT).isfinite().all()
        assert (after(text_BT[:, :4]) - before(text_BT[:, :4])).abs().max() > 1e-4  # slow pairs are slowed


def test_a_second_extension_counts_from_the_first_context(trained):
    build(trained, "once", max_position_embeddings=64, rope_scaling=YARN)
    (trained.parent / "once" / "model").rename(trained.parent / "again")
    twice = build(trained.parent / "again", max_position_embeddings=128, rope_scaling={"rope_type": "yarn", "factor": 8})
    assert twice.config.rope_scaling.original_max_position_embeddings == 16


def test_a_setting_that_the_weights_were_not_made_for_is_named(trained):
    with pytest.raises(ConfigError, match=r"^model\.num_hidden_layers: 3 is not the 2 of trained; with init_from, only"):
        build(trained, num_hidden_layers=3)
    assert build(trained, "same", num_hidden_layers=2).config.num_hidden_layers == 2


def test_learned_positions_end_where_they_end(trained):
    config = load_model(trained).config.with_changes(position_type="learned", model_type=None)
    save_model(random_decoder(config), trained, tokenizer=None)
    with pytest.raises(ConfigError, match=r"trained has learned positions, 16 of them, and none beyond"):
        build(trained, max_position_embeddings=64)


def test_another_tokenizer_is_refused(trained):
    write_folder(trained, byte_level_bpe([bytes([byte]) for byte in range(256)], "qwen2"))
    with pytest.raises(ConfigError, match=r"another tokenizer than the recipe's; .*: tokenize: \{tokenizer: trained\}"):
        build(trained)


def test_a_preset_and_an_existing_model_are_one_too_many():
    with pytest.raises(ConfigError, match="init_from takes the shape of the model in that folder"):
        ModelStageConfig.parse({"preset": "moe-3m", "init_from": "trained"}, "model")


def test_the_files_and_the_given_settings_enter_the_key_and_the_place_does_not(trained):
    def key(name="trained", **settings):
        config = ModelStageConfig.parse({"init_from": name, **settings})
        return config.output_settings(), existing_fingerprint(config, trained.parent)

    first = key()
    # the default of the setting, but not the model's
    assert key(max_position_embeddings=512)[0] == first[0] and key(max_position_embeddings=512)[1] != first[1]
    trained.rename(trained.parent / "moved")
    assert key("moved") == first
    decoder = load_model(trained.parent / "moved")
    with torch.no_grad():
        decoder.norm.weight[0] += 1
    save_model(decoder, trained.parent / "moved", tokenizer=trained.parent / "tokenizer")
    assert key("moved")[1] != first[1]


def test_a_recipe_goes_on_from_another_runs_model(here):  # noqa: F811
    small = "".join(f"{name}: {value}, " for name, value in SMALL.items())
    (here / "recipe.yaml").write_text(f"{_RECIPE}model: {{preset: null, {small}}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^model\.init_from: runs/small/stages/model: no such folder$"):
        prepare("recipe.yaml", ["model={init_from: runs/small/stages/model}"])
    first = execute(prepare("recipe.yaml"))
    for run in ("runs/small", "runs/small/stages/model", "runs/small/stages/model/model"):
        prepare("recipe.yaml", [f"model={{init_from: {run}, max_position_embeddings: 64}}"])
    with pytest.raises(ConfigError, match=r"^model\.hidden_size: 64 is not the 32 of runs/small"):
        prepare("recipe.yaml", ["model={init_from: runs/small, hidden_size: 64}"])
    override = "model={init_from: runs/small, max_position_embeddings: 64, rope_scaling: {rope_type: yarn, factor: 4}}"
    second = execute(prepare("recipe.yaml", [override]))
    before, after = load_model(first.folder / "model"), load_model(second.folder / "model")
    assert (before.config.max_position_embeddings, after.config.max_position_embeddings) == (16, 64)
    assert torch.equal(before.head_weight, after.head_weight)


def test_the_long_context_recipe_finds_the_quickstarts_tokens_again():
    quickstart, further = load_recipe("quickstart"), load_recipe("long-context")
    for stage in ("collect", "clean", "deduplicate", "select", "tokenize"):
        assert quickstart.stage(stage).config == further.stage(stage).config
    model, length = further.stage("model").config, further.stage("pretrain").config.context_length
    assert model.max_position_embeddings == length == 4 * quickstart.stage("model").config.max_position_embeddings
    assert model.rope_scaling.factor == 4
