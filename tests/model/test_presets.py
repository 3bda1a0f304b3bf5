from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bessemer.model.config import ModelStageConfig, layer_kinds, layer_table, preset_config
from bessemer.model.families import family_of
from bessemer.model.initialisation import empty_decoder
from bessemer.model.presets import PRESET_VOCABULARIES, PRESETS, PUBLISHED, TO_TRAIN
from bessemer.model.stage import build_model
from bessemer.model.storage.folder import load_model
from bessemer.pipeline.recipe import load_recipe
from tests.cases import slow_but
from tests.cli.test_main import bessemer
from tests.model.tokenizers import write_small_tokenizer

#: What the teams publish, or the number of elements in the files that they publish.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    # as the paper's shape gives; it says 175.0 billion
    "gpt3-175b": 96 * (12 * 12_288**2 + 13 * 12_288) + (50_257 + 2048 + 2) * 12_288,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "olmo2-1b": 1_484_916_736,
    "gemma3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200 - 58 * 256,  # less the correction biases, which are no weights here
    "kimi-k2": 1_026_408_232_448 - 60 * 384,  # the same
}
#: In billions, with what the teams leave out of it.
ACTIVE = {
    "mixtral-8x7b": (12.9, False),
    "qwen3-30b-a3b": (3.35, False),
    "gpt-oss-20b": (3.6, True),  # without the look-up in the embedding
    "gpt-oss-120b": (5.1, True),
}
FAMILIES = {
    "gpt2": "gpt2",
    "gpt3": "gpt2",
    "smollm2": "llama",
    "smollm3": "smollm3",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "qwen3-30b": "qwen3_moe",
    "qwen3-next": "qwen3_next",
    "olmo2": "olmo2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "deepseek": "deepseek_v3",
    "kimi": "deepseek_v3",
    "moe": "qwen3_moe",
    "hybrid": "qwen3_next",
    "mla": "deepseek_v3",
}


def config_of(name):
    return preset_config(name, PRESET_VOCABULARIES[name])


def test_every_published_preset_is_checked():
    assert PARAMETERS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_preset_has_the_published_number_of_parameters(name):
    assert config_of(name).parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_sparse_preset_has_the_published_active_parameters(name):
    billions, without_embedding = ACTIVE[name]
    config = config_of(name)
    look_up = config.vocab_size * config.hidden_size if without_embedding else 0
    assert (config.active_parameters() - look_up) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_saved_in_its_familys_form(name):
    prefix = max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)
    assert family_of(config_of(name)).model_type == FAMILIES[prefix]


#: Of each family the first.
ONE_OF_EACH = {family_of(config_of(name)).model_type: name for name in reversed(PRESETS)}.values()


@pytest.mark.parametrize("name", slow_but(ONE_OF_EACH, PRESETS))
def test_the_costs_of_a_preset_are_those_of_its_decoder(name):
    config = config_of(name)
    if config.num_hidden_layers > (kept := 7):  # as many layers as it takes for one of each kind
        cut = {key: getattr(config, key)[:kept] for key in ("layer_types", "no_rope_layers") if getattr(config, key)}
        config = config.with_changes(num_hidden_layers=kept, **cut)
    assert config.parameters() == sum(tensor.numel() for tensor in empty_decoder(config).parameters())
    assert sum(row["parameters"] for row in layer_table(config)) == config.parameters()


def test_layer_kinds_tell_every_layer_once():
    for name in PRESETS:
        config = config_of(name)
        layers = sorted(layer for kind in layer_kinds(config) for layer in kind["layers"])
        assert layers == list(range(1, config.num_hidden_layers + 1))
    kinds = layer_kinds(config_of("gemma3-1b"))
    assert [kind["layers"] for kind in kinds if kind["attention"].startswith("full")] == [[6, 12, 18, 24]]
    kinds = layer_kinds(config_of("deepseek-v3"))
    assert [kind["layers"] for kind in kinds if kind["feed_forward"].startswith("dense")] == [[1, 2, 3]]


@pytest.mark.parametrize("name", [name for name in TO_TRAIN if name != "qwen3-125m"])
def test_a_small_preset_is_built_saved_and_read_back(name, tmp_path):
    write_small_tokenizer(tmp_path / "tokenizer")
    settings = ModelStageConfig.parse({"preset": name})
    metrics = build_model(settings, tmp_path / "tokenizer", tmp_path, seed=1)
    decoder = load_model(tmp_path / "model")
    assert metrics["parameters"] == sum(tensor.numel() for tensor in decoder.parameters())
    asked = settings.model_for(decoder.config.vocab_size, decoder.config.bos_token_id, decoder.config.eos_token_id)
    assert decoder.config.with_changes(model_type=None) == asked
    with torch.no_grad():
        assert decoder(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize("name", slow_but(ONE_OF_EACH, PRESETS))
def test_a_preset_is_shown_whole(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = bessemer(capsys, "show", name)
    assert code == 0
    assert f"{config_of(name).parameters():,}" in out
    assert f"{config_of(name).num_hidden_layers} layers" in out
    assert "…" not in out.replace(" … ", "")


def test_presets_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = bessemer(capsys, "show", "presets")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(PRESETS)
    assert "671B" in out and "37.6B" in out


def test_presets_are_shown_without_torch():
    check = (
        "import sys; from bessemer.cli.show import _preset, _presets; from rich.console import Console; "
        "Console().print(_preset('deepseek-v3')); Console().print(_presets()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["moe-3m", "hybrid-3m"])
def test_the_quickstart_takes_any_preset(name):
    recipe = load_recipe("quickstart", [f"model.preset={name}"])
    assert recipe.stage("model").config.num_hidden_layers == PRESETS[name]["num_hidden_layers"]
    assert recipe.stage("model").config.max_position_embeddings == 256
