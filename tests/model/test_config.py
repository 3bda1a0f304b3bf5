from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig, ModelStageConfig, layer_table, model_metrics, preset_config
from bessemer.model.initialisation import empty_decoder
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.presets import PRESET_VOCABULARIES, PRESETS
from tests.model.randomised import SHAPES, random_decoder, random_tokens


@st.composite
def configs(draw):
    key_value_heads = draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 90)),
        hidden_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=key_value_heads * draw(st.integers(1, 3)),
        num_key_value_heads=key_value_heads,
        head_dim=2 * draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 50)),
        max_position_embeddings=draw(st.integers(1, 30)),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(configs())
@settings(max_examples=30, deadline=None)
def test_parameters_are_those_of_the_decoder(config):
    assert config.parameters() == sum(parameter.numel() for parameter in empty_decoder(config).parameters())


@given(configs())
@settings(max_examples=30, deadline=None)
def test_layer_table_adds_up_to_the_parameters(config):
    assert sum(row["parameters"] for row in layer_table(config)) == config.parameters()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [8, 33])
def test_flops_per_token_are_those_that_torch_counts(config, length):
    decoder = random_decoder(config).train()
    # attention's plain form: a fused backward computes the scores a second time, and that is counted too
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(random_tokens(config, 2, length)).sum().backward()
    assert counter.get_total_flops() == 2 * length * config.flops_per_token(length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_of_the_cache(dtype):
    config = SHAPES["grouped"]
    cache = DecoderCache(config, batch_size=3, capacity=7, dtype=dtype)
    stored = cache.nbytes
    assert stored == 3 * 7 * config.kv_bytes_per_token(dtype.itemsize)


def test_embedding_parameters_count_an_untied_head():
    config = SHAPES["grouped"]
    assert config.embedding_parameters() == 199 * 128
    assert config.with_changes(tie_word_embeddings=False).embedding_parameters() == 2 * 199 * 128


def test_published_size_of_qwen3_0_6b():
    config = preset_config("qwen3-0.6b", vocab_size=151_936)
    assert config.parameters() == 596_049_920
    assert config.parameters() - config.embedding_parameters() == 440_467_456


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [("qwen3-1m", 4096, 1.3), ("qwen3-3m", 4096, 3.1), ("qwen3-10m", 8192, 11.5), ("qwen3-125m", 32768, 125.9)],
)
def test_presets_have_the_size_in_their_name(name, vocab_size, millions):
    assert round(preset_config(name, vocab_size).parameters() / 1e6, 1) == millions


def test_every_preset_sets_only_known_keys():
    for name in PRESETS:
        ModelStageConfig.parse({"preset": name})


def test_a_setting_replaces_the_presets():
    config = ModelStageConfig.parse({"preset": "qwen3-3m", "num_hidden_layers": 2})
    assert (config.num_hidden_layers, config.hidden_size) == (2, 192)


def test_a_bare_word_names_the_preset():
    assert ModelStageConfig.parse("qwen3-10m").hidden_size == 320


def test_the_settings_of_a_preset_enter_the_stages_key():
    assert ModelStageConfig.parse("qwen3-3m").output_settings()["hidden_size"] == 192


def test_without_a_preset_the_defaults_hold():
    config = ModelStageConfig.parse({"preset": None, "hidden_size": 64})
    assert (config.hidden_size, config.num_hidden_layers) == (64, 4)


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"model: there is no preset 'qwen3-2m'; did you mean 'qwen3-"):
        ModelStageConfig.parse({"preset": "qwen3-2m"}, "model")


def test_an_unknown_key_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        ModelStageConfig.parse({"hiden_size": 3}, "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"bos_token_id": 199}, r"bos_token_id \(199\) lies outside the vocabulary of 199 tokens"),
        ({"num_hidden_layers": 0}, "greater than or equal to 1"),
        ({"hidden_size": "wide"}, "valid integer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SHAPES["grouped"].with_changes(**changes)


def test_metrics_are_plain_json():
    metrics = model_metrics(SHAPES["grouped"])
    assert json.loads(json.dumps(metrics)) == metrics


def test_settings_load_without_torch():
    check = "import sys, bessemer.model.config, bessemer.inference.sampling.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_every_preset_has_a_vocabulary_to_be_shown_with():
    assert PRESETS.keys() == PRESET_VOCABULARIES.keys()
